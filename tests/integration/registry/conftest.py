"""A Bento that is packaged once, for all tests that publish and fetch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from published_bento import PACKAGE, Published


@pytest.fixture(scope="session")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("packaged")
    done = subprocess.run(
        [sys.executable, "-c", PACKAGE, str(folder / "models"), str(folder / "place")],
        env={
            **os.environ,
            "BENTOML_HOME": str(folder / "home"),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return Published(folder / "home", folder / "place", done.stdout.split()[-1])


@pytest.fixture
def published(packaged: Published, tmp_path: Path) -> Published:
    """A copy of the published folder, for the test to change."""
    place = tmp_path / "place"
    shutil.copytree(packaged.place, place)
    return Published(packaged.home, place, packaged.digest)
