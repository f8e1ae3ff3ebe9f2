"""What to install, as messages say it, must work where no index knows the toolkit's own name."""

from __future__ import annotations

import os
import pickle
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mlops.errors import MissingDependencyError
from mlops.installation import install_command, requirements

REPOSITORY = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def holding(declared: list[str]) -> list[Requirement]:
    """Those for this platform, without the marker that says so."""
    found = map(Requirement, declared)
    here = [one for one in found if one.marker is None or one.marker.evaluate()]
    for requirement in here:
        requirement.marker = None
    return here


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_is_installed_by_what_it_consists_of(extra: str) -> None:
    library = Requirement(EXTRAS[extra][0]).name
    said = set(map(Requirement, requirements(library, extra)))
    assert said == set(holding(EXTRAS[extra]) or [Requirement(library)])


@pytest.mark.parametrize("requirement", holding(PROJECT["dependencies"]), ids=lambda r: r.name)
def test_a_dependency_is_installed_in_the_versions_that_work(requirement: Requirement) -> None:
    assert list(map(Requirement, requirements(requirement.name))) == [requirement]
    assert requirement.specifier.contains(version(requirement.name))


def test_a_library_of_nobodys_is_installed_by_its_name() -> None:
    assert requirements("no-such-library") == ["no-such-library"]


def test_the_command_works_as_pasted() -> None:
    """In a shell that does not know this environment; nothing is changed."""
    command = install_command("ray", "ray")
    options = "--dry-run" if " -m pip " in command else "--dry-run --offline"
    done = subprocess.run(
        ["bash", "-c", command.replace(" install ", f" install {options} ", 1)],
        capture_output=True,
        text=True,
        check=False,
        env={
            "HOME": os.environ.get("HOME", "/"),
            "PATH": os.pathsep.join(
                place
                for place in os.environ["PATH"].split(os.pathsep)
                if Path(place) != Path(sys.executable).parent
            ),
        },
    )
    assert done.returncode == 0, done.stderr


def test_a_missing_library_is_one_sentence_with_the_command() -> None:
    error = MissingDependencyError("ray", "ray")
    assert str(error) == f"ray is not installed; install it with: {install_command('ray', 'ray')}"
    assert "ray[serve]" in shlex.split(str(error))[-1]
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (str(again), again.extra) == (str(error), "ray")


def test_no_message_names_a_package_that_no_index_has() -> None:
    for path in sorted((REPOSITORY / "src").rglob("*.py")):
        if path.name != "installation.py":
            found = re.search(r"mlx-mlops\[|pip install", path.read_text(encoding="utf-8"))
            assert found is None, f"{path}: say it with mlops.installation.install_command"
