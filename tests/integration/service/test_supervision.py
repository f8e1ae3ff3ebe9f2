"""What the command counts as a worker that cannot load, and what it tells its workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import bentoml
import pytest

from mlops.hardware import detect
from mlops.serving.bentoml import commands, supervision
from mlops.serving.bentoml.service import create_bentoml_service
from mlops.serving.runner import MLXModelRunner

BEGINS_AND_ENDS = """
import bentoml, sys
from mlops.serving.bentoml import supervision
@bentoml.service
class Tiny: ...
begins = supervision.begin_loading(Tiny)
if "asked" in sys.argv:
    supervision.end_loading()
sys.exit(0 if begins else 5)
"""


def worker(*arguments: str) -> int:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BEGINS_AND_ENDS, *arguments], check=False
    ).returncode


def test_deaths_count_until_a_worker_loads_or_is_asked_to_stop(bentoml_home: Path) -> None:
    with supervision.supervised():
        folder = Path(os.environ[supervision.FOLDER_VARIABLE])
        assert [worker(), worker()] == [0, 0]
        assert len(list(folder.iterdir())) == 2
        assert worker("asked") == 0
        assert not list(folder.iterdir())
        assert [worker("asked") for _ in range(4)] == [0] * 4


def test_a_service_that_is_asked_to_stop_has_not_died(
    bentoml_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(supervision.FOLDER_VARIABLE, str(tmp_path))
    (tmp_path / str(os.getpid())).touch()
    service = create_bentoml_service(tmp_path, runner_class=MLXModelRunner)
    instance = service.inner.__new__(service.inner)
    import asyncio

    asyncio.run(instance.stop())
    assert not (tmp_path / str(os.getpid())).exists()


@bentoml.service(workers=3)
class Three:
    @bentoml.api
    def shout(self, text: str) -> str:
        return text.upper()


@bentoml.service(envs=[{"name": "OPENBLAS_NUM_THREADS", "value": "7"}])
class Chosen(Three.inner):
    pass


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in commands.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    cores = detect().performance_cores
    share = {"OPENBLAS_NUM_THREADS": str(max(1, cores // 3))}
    assert commands._configured_workers(Three) == 3
    assert commands._thread_environment(Three, 3, set()) == share
    assert commands._thread_environment(Three, 1, set()) == {}
    assert commands._thread_environment(Chosen, 3, set()) == {}
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert commands._thread_environment(Three, 3, set()) == {}
    monkeypatch.delenv("OMP_NUM_THREADS")
    # Importing a service that imports MLX sets it for this process alone.
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", str(cores))
    assert commands._thread_environment(Three, 3, set()) == share
    assert "OPENBLAS_NUM_THREADS" not in os.environ


def test_the_workers_are_told_how_many_they_are() -> None:
    with supervision.supervised(4, {"OPENBLAS_NUM_THREADS": "1"}):
        assert supervision.planned_workers(2) == 4
        assert os.environ["OPENBLAS_NUM_THREADS"] == "1"
    assert supervision.planned_workers(2) == 2
