"""Which MLflow store a client takes, decided without opening it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mlops.client import create_client
from mlops.errors import ConfigError


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_the_default_is_a_file_in_the_working_directory(tmp_path: Path) -> None:
    assert create_client("p").tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert not list(tmp_path.iterdir())


def test_the_environment_and_then_the_argument_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from.environment:5000")
    assert create_client("p").tracking_uri == "http://from.environment:5000"
    client = create_client("p", tracking_uri="http://from.argument")
    assert client.tracking_uri == "http://from.argument"


def test_a_relative_file_stays_where_it_was(tmp_path: Path) -> None:
    client = create_client("p", tracking_uri="sqlite:///runs.db")
    assert client.tracking_uri == f"sqlite:///{tmp_path}/runs.db"


def test_credentials_are_not_shown() -> None:
    client = create_client("p", tracking_uri="https://me:secret@mlflow.test/path")
    assert client.tracking_uri == "https://mlflow.test/path"


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:", "sqlite:///", "  "])
def test_a_store_that_is_none_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="tracking_uri"):
        create_client("p", tracking_uri=uri)


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "x" * 501, None])
def test_a_project_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="project_name"):
        create_client(name)


def test_importing_and_making_a_client_imports_nothing_heavy() -> None:
    script = (
        "import sys; from mlops.client import create_client; create_client('p');"
        "print([m for m in ('mlflow', 'mlx', 'numpy', 'sqlalchemy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
