from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from mlops.errors import EngineError, EngineShutdownError, QueueFullError
from mlops.serving.http.batcher import QUIET, Pending, set_answers
from mlops.serving.http.batcher import Batcher as AnyBatcher

LONG_S = 60.0

Batcher = functools.partial(AnyBatcher, deliver=set_answers)


class Asked(Pending):
    """A request whose answer a test can wait for without an event loop."""

    answer: Future[Any]


def ask(batcher: AnyBatcher, text: str, deadline_s: float = LONG_S) -> Asked:
    pending = Asked({"text": text}, time.monotonic() + deadline_s, Future())
    batcher.submit(pending)
    return pending


class Recorder:
    """Answers with the text; a closed gate holds the batch."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()

    def __call__(self, batch: Sequence[Pending]) -> list[Any]:
        self.batches.append([pending.input_data["text"] for pending in batch])
        self.started.set()
        self.gate.wait(LONG_S)
        return [{"prediction": pending.input_data["text"]} for pending in batch]


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    yield recorder
    recorder.gate.set()


def hold(recorder: Recorder, batcher: AnyBatcher) -> Pending:
    """Occupy the batcher's thread with one request."""
    recorder.gate.clear()
    first = ask(batcher, "first")
    assert recorder.started.wait(LONG_S)
    return first


def test_requests_that_wait_go_together_in_their_order(recorder: Recorder) -> None:
    batcher = Batcher(recorder, batch_limit=lambda: 3, max_latency_ms=0, max_waiting=9)
    hold(recorder, batcher)
    waiting = [ask(batcher, str(n)) for n in range(5)]
    recorder.gate.set()
    answers = [pending.answer.result(LONG_S)["prediction"] for pending in waiting]
    assert answers == ["0", "1", "2", "3", "4"]
    assert recorder.batches == [["first"], ["0", "1", "2"], ["3", "4"]]
    assert batcher.batch_sizes == {1: 1, 3: 1, 2: 1}
    batcher.close()


def test_a_full_batch_does_not_wait(recorder: Recorder) -> None:
    latency_ms = LONG_S * 1000
    batcher = Batcher(recorder, batch_limit=lambda: 2, max_latency_ms=latency_ms, max_waiting=9)
    pair = [ask(batcher, "a"), ask(batcher, "b")]
    assert [pending.answer.result(LONG_S / 2)["prediction"] for pending in pair] == ["a", "b"]
    assert recorder.batches == [["a", "b"]]
    batcher.close()


def test_a_lone_request_does_not_wait_for_ever(recorder: Recorder) -> None:
    batcher = Batcher(recorder, batch_limit=lambda: 8, max_latency_ms=30, max_waiting=9)
    started = time.monotonic()
    ask(batcher, "a").answer.result(LONG_S)
    assert time.monotonic() - started >= QUIET * 0.03
    batcher.close()


def test_a_batch_waits_while_others_come(recorder: Recorder) -> None:
    batcher = Batcher(recorder, batch_limit=lambda: 3, max_latency_ms=LONG_S * 1000, max_waiting=9)
    first = ask(batcher, "first")
    assert not recorder.started.wait(0.05)  # a tenth of the latency is seconds
    others = [ask(batcher, text) for text in ("second", "third")]
    for pending in (first, *others):
        pending.answer.result(LONG_S)
    assert recorder.batches == [["first", "second", "third"]]
    batcher.close()


def test_answers_arrive_in_the_loops_of_those_who_asked(recorder: Recorder) -> None:
    batcher = AnyBatcher(recorder, batch_limit=lambda: 4, max_latency_ms=0, max_waiting=9)

    async def ask_here(text: str) -> Any:
        answer = asyncio.get_running_loop().create_future()
        batcher.submit(Pending({"text": text}, time.monotonic() + LONG_S, answer))
        return await answer

    async def ask_both() -> list[Any]:
        return await asyncio.gather(ask_here("a"), ask_here("b"))

    assert asyncio.run(ask_both()) == [{"prediction": "a"}, {"prediction": "b"}]
    assert asyncio.run(ask_here("c")) == {"prediction": "c"}
    batcher.close()


def test_the_limit_is_asked_for_every_batch(recorder: Recorder) -> None:
    limits = iter([1, 1, 4])
    batcher = Batcher(
        recorder, batch_limit=lambda: next(limits, 4), max_latency_ms=0, max_waiting=9
    )
    hold(recorder, batcher)
    waiting = [ask(batcher, str(n)) for n in range(5)]
    recorder.gate.set()
    for pending in waiting:
        pending.answer.result(LONG_S)
    assert [len(batch) for batch in recorder.batches] == [1, 1, 4]
    batcher.close()


def test_a_full_queue_refuses_and_takes_again(recorder: Recorder) -> None:
    batcher = Batcher(recorder, batch_limit=lambda: 1, max_latency_ms=0, max_waiting=2)
    hold(recorder, batcher)
    waiting = [ask(batcher, str(n)) for n in range(2)]
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        ask(batcher, "one too many")
    recorder.gate.set()
    for pending in waiting:
        pending.answer.result(LONG_S)
    assert ask(batcher, "later").answer.result(LONG_S) == {"prediction": "later"}
    batcher.close()


def test_the_places_of_those_who_left_are_free(recorder: Recorder) -> None:
    batcher = Batcher(recorder, batch_limit=lambda: 1, max_latency_ms=0, max_waiting=1)
    hold(recorder, batcher)
    left = ask(batcher, "left")
    left.is_abandoned = True
    stayed = ask(batcher, "stayed")
    recorder.gate.set()
    stayed.answer.result(LONG_S)
    assert ["left"] not in recorder.batches
    batcher.close()


@pytest.mark.parametrize("reason", ["abandoned", "expired", "cancelled"])
def test_nothing_is_computed_for_nobody(recorder: Recorder, reason: str) -> None:
    batcher = Batcher(recorder, batch_limit=lambda: 1, max_latency_ms=0, max_waiting=9)
    hold(recorder, batcher)
    dropped = ask(batcher, "dropped", deadline_s=0 if reason == "expired" else LONG_S)
    if reason == "abandoned":
        dropped.is_abandoned = True
    if reason == "cancelled":
        dropped.answer.cancel()
    last = ask(batcher, "last")
    recorder.gate.set()
    last.answer.result(LONG_S)
    assert recorder.batches == [["first"], ["last"]]
    batcher.close()


def test_one_bad_request_leaves_the_others_alone() -> None:
    def run(batch: Sequence[Pending]) -> list[Any]:
        return [
            ValueError("bad") if pending.input_data["text"] == "bad" else {"prediction": "good"}
            for pending in batch
        ]

    batcher = Batcher(run, batch_limit=lambda: 2, max_latency_ms=60_000, max_waiting=9)
    good, bad = ask(batcher, "good"), ask(batcher, "bad")
    assert good.answer.result(LONG_S) == {"prediction": "good"}
    assert isinstance(bad.answer.exception(LONG_S), ValueError)
    batcher.close()


def test_a_batch_that_fails_is_not_the_end(recorder: Recorder) -> None:
    def run(batch: Sequence[Pending]) -> list[Any]:
        if batch[0].input_data["text"] == "crash":
            raise MemoryError("no memory")
        if batch[0].input_data["text"] == "exit":
            raise SystemExit(3)
        if batch[0].input_data["text"] == "short":
            return []
        return recorder(batch)

    batcher = Batcher(run, batch_limit=lambda: 1, max_latency_ms=0, max_waiting=9)
    crash, leave, short, good = (ask(batcher, text) for text in ("crash", "exit", "short", "good"))
    assert isinstance(crash.answer.exception(LONG_S), MemoryError)
    assert isinstance(leave.answer.exception(LONG_S), EngineError)
    assert isinstance(short.answer.exception(LONG_S), EngineError)
    assert good.answer.result(LONG_S) == {"prediction": "good"}
    batcher.close()


def test_closing_answers_everyone(recorder: Recorder) -> None:
    batcher = Batcher(recorder, batch_limit=lambda: 1, max_latency_ms=0, max_waiting=9)
    running = hold(recorder, batcher)
    waiting = ask(batcher, "waiting")
    closing = threading.Thread(target=batcher.close)
    closing.start()
    recorder.gate.set()
    closing.join(LONG_S)
    assert running.answer.result(LONG_S) == {"prediction": "first"}
    # What waited may just have made it into a batch; nobody is left without an answer.
    assert _outcome(waiting.answer) in ({"prediction": "waiting"}, EngineShutdownError)
    with pytest.raises(EngineShutdownError):
        ask(batcher, "late")


def _outcome(answer: Future[Any]) -> Any:
    exception = answer.exception(LONG_S)
    return type(exception) if exception else answer.result()
