"""What the command makes of its workers' deaths, and what it tells them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import bentoml
import pytest

from mlops.errors import ServiceError
from mlops.hardware import detect
from mlops.serving.bentoml import commands, supervision
from mlops.serving.bentoml.service import create_bentoml_service
from mlops.serving.runner import MLXModelRunner

READY = """
import sys
from mlops.serving.bentoml import supervision
supervision.note_ready()
"""
KILLED = -signal.SIGKILL


@dataclass
class Command:
    """The command's side, and workers that are started and reaped by hand."""

    deaths: supervision.Deaths
    folder: Path

    def ready_worker(self) -> int:
        """A worker that says that it is ready; its process id."""
        with subprocess.Popen([sys.executable, "-W", "ignore", "-c", READY]) as worker:
            assert worker.wait() == 0
        return worker.pid

    def dies(self, process_id: int, status: int, service: str = "service") -> bool:
        return self.deaths.on_death(service, process_id, status, is_last=False)


@contextlib.contextmanager
def command() -> Iterator[Command]:
    with supervision.supervised(ours={"service"}) as deaths:
        yield Command(deaths, Path(os.environ[supervision.FOLDER_VARIABLE]))


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (
            KILLED,
            "3 workers in a row .* the last one killed by SIGKILL, most likely for want of mem",
        ),
        (3, "3 workers in a row .* the last one ended with status 3: what it printed says why"),
        (-signal.SIGSEGV, "the last one was killed by SIGSEGV"),
        (0, "the last one ended with status 0"),
    ],
)
def test_workers_that_die_before_they_are_ready_end_the_command(status: int, reason: str) -> None:
    with pytest.raises(ServiceError, match=reason), command() as one:
        assert [one.dies(process_id, status) for process_id in (1, 2, 3)] == [False, False, True]


def test_the_last_ones_exception_is_told() -> None:
    with (
        pytest.raises(ServiceError, match="the last with PermissionError: no place"),
        command() as one,
    ):
        with pytest.raises(PermissionError), supervision.noting_failures():
            raise PermissionError("no place")
        assert [one.dies(process_id, 3) for process_id in (1, 2, os.getpid())][-1]


def test_deaths_count_until_another_worker_is_ready() -> None:
    with command() as one:
        assert not any(one.dies(process_id, KILLED) for process_id in (1, 2))
        ready = one.ready_worker()
        assert not any(one.dies(process_id, KILLED) for process_id in (3, 4))
        assert not one.dies(ready, 1)  # it was ready, and broke later
        assert [path.name for path in one.folder.iterdir()] == []
        assert one.dies(5, KILLED)
        (one.folder / "reason").unlink()


def test_who_was_asked_to_end_or_is_none_of_ours_does_not_count() -> None:
    with command() as one:
        for status in (-signal.SIGTERM, -signal.SIGINT):
            assert not any(one.dies(process_id, status) for process_id in range(1, 9))
        assert not any(one.dies(process_id, 1, "service_other") for process_id in range(1, 9))


def test_a_worker_that_nobody_replaces_ends_the_command() -> None:
    reason = "worker 7 was killed by SIGKILL .out of memory"
    with pytest.raises(ServiceError, match=reason), supervision.supervised() as deaths:
        assert deaths.on_death("service", 7, KILLED, is_last=True)
        raise RuntimeError("No active process found for watcher.")  # as circus then does


def test_deaths_are_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with command() as one:
        one.dies(1, KILLED)
        one.dies(2, -signal.SIGTERM)
        one.dies(one.ready_worker(), 0)
        one.dies(3, 1)
    assert caplog.messages == [
        "worker 1 was killed by SIGKILL (out of memory?)",
        "worker 3 ended with status 1",
    ]


def test_a_service_that_is_asked_to_stop_has_not_died(
    bentoml_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(supervision.FOLDER_VARIABLE, str(tmp_path))
    service = create_bentoml_service(tmp_path, runner_class=MLXModelRunner)
    instance = service.inner.__new__(service.inner)
    asyncio.run(instance.stop())
    assert (tmp_path / f"ready-{os.getpid()}").exists()


def test_the_reason_of_a_failed_load_is_told_by_the_command_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = ServiceError("the weights are damaged", "load_model")
    with pytest.raises(ServiceError, match="the weights are damaged"), command():
        supervision.report_failure(failure)
        supervision.report_failure(ServiceError("another worker's", "load_model"))
    assert caplog.messages == []
    supervision.report_failure(failure)  # under any other server
    assert caplog.messages == ["the model could not be loaded: the weights are damaged"]


def test_without_a_temporary_folder_the_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    with pytest.raises(ServiceError, match="set TMPDIR"), supervision.supervised():
        pass


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
