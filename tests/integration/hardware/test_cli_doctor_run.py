"""`mlops doctor` and `mlops run` as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlops.hardware import detect

MLOPS = [sys.executable, "-c", "from mlops.cli import main; main()"]


def mlops(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MLOPS, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_help_lists_the_commands_and_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *MLOPS[1:], "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert "doctor" in done.stdout
    assert "run" in done.stdout
    imported = {
        line.rsplit("|", 1)[-1].strip().partition(".")[0] for line in done.stderr.splitlines()
    }
    assert not imported & {"mlx", "numpy", "bentoml", "mlflow", "rich", "transformers", "ray"}


@pytest.mark.parametrize("command", ["doctor", "run", "serve", "predict"])
def test_each_command_shows_examples(command: str) -> None:
    assert f"mlops {command}" in mlops(command, "--help").stdout


def test_doctor_prints_facts_and_ends_with_0_when_all_is_well(tmp_path: Path) -> None:
    done = mlops("doctor", "--json", BENTOML_HOME=str(tmp_path))
    facts = json.loads(done.stdout)

    assert facts["store"] == str(tmp_path)
    assert facts["versions"]["bentoml"]
    assert done.returncode == (1 if facts["problems"] else 0)


def test_doctor_names_a_problem_and_its_fix_and_ends_with_1(tmp_path: Path) -> None:
    (tmp_path / "[red]file").touch()
    done = mlops("doctor", BENTOML_HOME=str(tmp_path / "[red]file" / "x"), COLUMNS="400")

    assert done.returncode == 1
    assert f"The store {tmp_path / '[red]file' / 'x'} cannot be written." in done.stdout
    assert "Set BENTOML_HOME" in done.stdout


def test_run_keeps_the_arguments_the_exit_status_and_the_environment() -> None:
    code = "import os, sys; print(sys.argv[1:], os.environ['KEPT']); sys.exit(7)"
    done = mlops("run", "--", sys.executable, "-c", code, "--help", "-x", "a b", KEPT="yes")

    assert done.stdout == "['--help', '-x', 'a b'] yes\n"
    assert done.returncode == 7


@pytest.mark.skipif(detect().mlx_backend != "cpu", reason="only a Linux CPU needs it")
def test_a_program_that_knows_nothing_of_mlops_gets_the_optimized_blas() -> None:
    code = (
        "import ctypes, mlx.core as mx\n"
        "mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))\n"
        "from mlops.hardware import ensure_blas\n"
        "print(ensure_blas().optimized)"
    )
    done = mlops("run", "--", sys.executable, "-W", "error", "-c", code)

    assert (done.stdout, done.stderr) == ("True\n", "")


def test_a_command_that_is_not_there_is_one_clear_sentence() -> None:
    done = mlops("run", "no-such-command", "--flag")

    assert done.returncode == 127
    assert done.stderr.count("\n") == 1
    assert "no-such-command cannot be started" in done.stderr


FAILING_COMMAND = """
import sys
from mlops.cli import app, main
from mlops.errors import PackagingError

@app.command()
def fail() -> None:
    raise PackagingError("The store is full; delete a model.", "package_model")

main()
"""


@pytest.mark.parametrize(
    ("arguments", "variable", "traceback"),
    [
        (["fail"], "", False),
        (["fail"], "0", False),
        (["--debug", "fail"], "", True),
        (["fail"], "1", True),
    ],
)
def test_an_error_is_one_sentence_and_a_traceback_only_on_request(
    arguments: list[str], variable: str, traceback: bool
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILING_COMMAND, *arguments],
        env={**os.environ, "MLOPS_DEBUG": variable},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 1
    assert "The store is full; delete a model." in done.stderr
    assert ("Traceback" in done.stderr) is traceback
    assert traceback or done.stderr.count("\n") == 1


def test_version() -> None:
    from mlops import __version__

    assert mlops("--version").stdout == f"mlops {__version__}\n"
