"""When an engine counts as standing still."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest

from mlops.engine.statistics import EngineStatistics
from mlops.serving.http import RunnerHost, progress
from mlops.serving.http.batcher import Batcher, Pending
from mlops.serving.http.progress import Progress

PAUSE_S = 0.01


@dataclass
class Engine:
    """A text runner's statistics, as a test has them happen."""

    counts: EngineStatistics = field(default_factory=EngineStatistics)
    now: dict[str, Any] = field(default_factory=lambda: {"running": 0, "waiting": 0})

    def statistics(self) -> dict[str, Any]:
        return {**self.counts.snapshot(), **self.now}

    def end_one(self, reason: str = "stop") -> None:
        self.counts.on_finish(
            None,
            reason,
            prompt_tokens=3,
            completion_tokens=5,
            queue_s=0.1,
            first_token_s=0.2,
            total_s=0.3,
        )


def host_of(engine: Engine) -> RunnerHost:
    host = RunnerHost(lambda: None)  # type: ignore[arg-type, return-value]
    host.text_runner = engine  # type: ignore[assignment]
    return host


@dataclass
class Watched:
    """What a health check sees of a host, now and after a while."""

    host: RunnerHost
    progress: Progress = field(default_factory=Progress)

    def still_s(self) -> float:
        return self.progress.still_s(self.host.text_runner, self.host.batcher)

    def stands_still(self, meanwhile: Callable[[], Any] = lambda: None) -> bool:
        """Whether nothing moved in a time in which that happened."""
        before_s = self.still_s()
        time.sleep(PAUSE_S)
        meanwhile()
        return self.still_s() >= before_s + PAUSE_S


def test_who_has_nothing_to_do_does_not_stand_still() -> None:
    watched = Watched(host_of(Engine()))
    for _ in range(3):
        assert watched.still_s() == 0
        time.sleep(PAUSE_S)


def test_a_host_without_a_model_does_not_stand_still() -> None:
    watched = Watched(RunnerHost(lambda: None))  # type: ignore[arg-type, return-value]
    assert not watched.stands_still()


@pytest.mark.parametrize("work", [{"running": 1}, {"waiting": 1}, {"embeddings": {"running": 1}}])
def test_who_has_something_to_do_and_does_nothing_stands_still(work: dict[str, Any]) -> None:
    engine = Engine(now=dict(work))
    watched = Watched(host_of(engine))
    assert watched.still_s() == 0
    assert watched.stands_still()
    first_s = watched.still_s()
    assert watched.stands_still()
    assert watched.still_s() >= first_s + PAUSE_S
    engine.now = {}
    assert watched.still_s() == 0


@pytest.mark.parametrize(
    "meanwhile",
    [
        lambda engine: engine.counts.on_step(1, 1),
        lambda engine: engine.counts.on_prefill(5),
        lambda engine: engine.counts.on_cached(5),
        lambda engine: engine.end_one(),
        lambda engine: engine.end_one("cancelled"),
        lambda engine: engine.now["resident_adapters"].update(loads=time.monotonic_ns()),
        lambda engine: engine.now["embeddings"].update(texts=time.monotonic_ns()),
    ],
)
def test_whatever_is_done_is_progress(meanwhile: Callable[[Engine], None]) -> None:
    engine = Engine(
        now={"running": 1, "resident_adapters": {"loads": 0}, "embeddings": {"texts": 0}}
    )
    watched = Watched(host_of(engine))
    for _ in range(2):
        assert watched.stands_still()
        meanwhile(engine)
        assert watched.still_s() == 0


def test_what_is_asked_for_is_no_progress() -> None:
    """However many come, and for however many adapters."""
    held, embeddings = {"in_use": 1}, {"running": 1}
    engine = Engine(
        now={"running": 1, "waiting": 0, "resident_adapters": held, "embeddings": embeddings}
    )
    watched = Watched(host_of(engine))

    def another() -> None:
        engine.counts.on_submit("formal")
        engine.now["waiting"] += 1
        held["in_use"] += 1
        embeddings["running"] += 1

    watched.still_s()
    for _ in range(3):
        assert watched.stands_still(another)


def test_a_process_that_was_stopped_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(host_of(Engine(now={"running": 1})))
    watched.still_s()
    later_s = time.monotonic() + 3600
    monkeypatch.setattr(time, "monotonic", lambda: later_s)
    assert watched.still_s() <= progress.MAX_GAP_S


def test_an_adapter_whose_files_are_hashed_is_waited_for() -> None:
    engine = Engine(now={"waiting": 1, "resident_adapters": {"loading": 1}, "turns": 0})
    watched = Watched(host_of(engine))
    watched.still_s()

    def look() -> None:
        engine.now["turns"] += 1

    for _ in range(3):
        assert not watched.stands_still(look)
    assert watched.stands_still()  # the thread that should look hangs


def test_to_look_is_no_progress_without_one() -> None:
    engine = Engine(now={"waiting": 1, "resident_adapters": {"loading": 0}, "turns": 0})
    watched = Watched(host_of(engine))
    watched.still_s()
    assert watched.stands_still(lambda: engine.now.update(turns=1))


def test_time_without_work_does_not_count() -> None:
    """Nothing has moved since the last request, which was long ago."""
    engine = Engine()
    watched = Watched(host_of(engine))
    watched.still_s()
    time.sleep(PAUSE_S)
    since_s = time.monotonic()
    assert watched.still_s() == 0
    engine.now = {"waiting": 1}
    assert watched.still_s() <= time.monotonic() - since_s


class Batches:
    """A custom model, whose batches take as long as a test wants."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)
        self.batcher = Batcher(
            self._run,
            batch_limit=lambda: 2,
            max_latency_ms=0,
            max_waiting=8,
            deliver=lambda _: None,
        )
        self.host = RunnerHost(lambda: None)  # type: ignore[arg-type, return-value]
        self.host.batcher = self.batcher

    def _run(self, batch: Any) -> Any:
        self.begun.release()
        assert self.gate.acquire(timeout=30)
        return [{} for _ in batch]

    def ask(self) -> None:
        self.batcher.submit(Pending({}, time.monotonic() + 60, Future()))

    def next_begins(self) -> None:
        assert self.begun.acquire(timeout=30)


def test_a_batch_stands_still_until_the_next_one_begins() -> None:
    batches = Batches()
    watched = Watched(batches.host)
    try:
        assert watched.still_s() == 0
        batches.ask()
        batches.next_begins()
        watched.still_s()
        assert watched.stands_still()
        assert watched.stands_still(batches.ask)  # one that waits is no progress
        batches.gate.release()
        batches.next_begins()
        assert watched.still_s() == 0
        assert watched.stands_still()
    finally:
        batches.gate.release(2)
        batches.batcher.close()
    assert watched.still_s() == 0
