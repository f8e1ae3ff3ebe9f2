"""A real MLflow on SQLite, and an address where nothing listens."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_SCRIPT = """
from mlops.client import create_client
client = create_client("shared project")
client.log_param("a", 1)
print(client.run_id, flush=True)
"""
_ENDS = {
    "quietly": "",
    "with an error": "1 / 0",
    "after its child": """
import os, sys, warnings
warnings.simplefilter("ignore")  # Python's of fork among threads
child = os.fork()
if not child:
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
import mlflow
print(mlflow.MlflowClient(tracking_uri=client.tracking_uri).get_run(client.run_id).info.status)
""",
}


@pytest.fixture(scope="session")
def first_processes(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, subprocess.CompletedProcess[str]]]:
    """Processes that begin together in a folder without a store, and each end in a way of its own.

    Once for all tests: each imports MLflow, and one of them lays out the store's tables.
    """
    folder = tmp_path_factory.mktemp("first")
    (folder / ".mlflow.db.new").write_text("left by a process that was killed")
    unset = ("MLFLOW_TRACKING_URI", "MLFLOW_LOGGING_LEVEL")
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", _SCRIPT + end],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={key: value for key, value in os.environ.items() if key not in unset},
        )
        for name, end in _ENDS.items()
    }
    ended = {}
    for name, process in started.items():
        out, err = process.communicate(timeout=240)
        ended[name] = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    return folder, ended


@pytest.fixture(scope="session")
def database(first_processes: tuple[Path, object]) -> Path:
    """A store with its tables."""
    return first_processes[0] / "mlflow.db"


@pytest.fixture
def store(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an MLflow store of its own; returns the directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    shutil.copy(database, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def dead_uri() -> Iterator[str]:
    """A port that is taken, so that nobody else gets it, and on which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
