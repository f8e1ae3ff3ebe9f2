"""Requests that arrive together are answered together.

One thread takes waiting requests in their order, as many as a batch may hold, and hands them to the
runner. A batch goes when it is full, when its oldest request has waited `max_latency_ms`, or when
nobody else seems to come: no other has for a tenth of that, or for as long as the last batch took,
since to wait longer than to compute gains nothing. Nothing of this happens on the event loop, which
is woken once for all answers of a batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from mlops.counts import count
from mlops.engine import to_exception
from mlops.errors import EngineError, EngineShutdownError, QueueFullError
from mlops.serving.runner.base import Prediction

logger = logging.getLogger(__name__)

QUIET = 0.1
"""Of the latency: so long without a new request, and the batch waits no longer."""

RunBatch = Callable[[Sequence["Pending"]], Sequence[Prediction | Exception]]
Answered = Sequence[tuple["Pending", Prediction | Exception]]


@dataclass(eq=False)
class Pending:
    """One request: what was asked, where the answer goes, and whether anyone still waits for it.

    Attributes:
        deadline: of `time.monotonic()`.
        answer: set by the batcher's `deliver`.
    """

    input_data: Mapping[str, Any]
    deadline: float
    answer: asyncio.Future[Prediction] | Future[Prediction]
    arrived: float = field(default_factory=time.monotonic)
    is_abandoned: bool = False

    @property
    def is_over(self) -> bool:
        """True when the client has left or its time is over: computing on would be for nobody."""
        return self.is_abandoned or self.answer.cancelled() or time.monotonic() >= self.deadline


def set_answers(answered: Answered) -> None:
    """Give each request its answer, unless nobody waits for it."""
    for pending, answer in answered:
        if pending.answer.done():
            continue
        if isinstance(answer, Exception):
            pending.answer.set_exception(answer)
        else:
            pending.answer.set_result(answer)


def deliver_in_loops(answered: Answered) -> None:
    """`set_answers` in the event loop of each request, which is woken once."""
    loops: dict[asyncio.AbstractEventLoop, list[tuple[Pending, Prediction | Exception]]] = {}
    for one in answered:
        loops.setdefault(one[0].answer.get_loop(), []).append(one)  # type: ignore[union-attr]
    for loop, theirs in loops.items():
        with contextlib.suppress(RuntimeError):  # closed: nobody waits there any more
            loop.call_soon_threadsafe(set_answers, theirs)


class Batcher:
    """Collects requests into batches for one runner.

    Args:
        run_batch: answers several requests in their order; called in the batcher's thread.
        batch_limit: how many requests a batch may hold now; asked before each batch.
        max_latency_ms: the longest a request waits for its batch to fill; 0 starts at once.
        max_waiting: how many requests may wait before new ones are refused.
        deliver: gives the requests of a batch their answers.
    """

    def __init__(
        self,
        run_batch: RunBatch,
        *,
        batch_limit: Callable[[], int],
        max_latency_ms: float,
        max_waiting: int,
        deliver: Callable[[Answered], None] = deliver_in_loops,
    ) -> None:
        self._run_batch = run_batch
        self._deliver = deliver
        self._batch_limit = batch_limit
        self._max_latency_s = max_latency_ms / 1000
        self._max_waiting = max_waiting
        self._waiting: deque[Pending] = deque()
        self._limit = 1
        self._quiet_s = QUIET * self._max_latency_s
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self.num_running = 0
        self.batch_sizes: Counter[int] = Counter()
        self.failure: str | None = None  # why no batch will ever be answered again
        self._thread = threading.Thread(target=self._work, name="mlops-batcher", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Requests that are not yet in a batch."""
        return len(self._waiting)

    def submit(self, pending: Pending) -> None:
        """Queue a request; its `answer` is set later.

        Raises:
            QueueFullError: `max_waiting` requests wait already.
            EngineShutdownError: the batcher is closed.
        """
        with self._changed:
            if self._closed.is_set():
                raise self._closed_error()
            if len(self._waiting) >= self._max_waiting:
                self._waiting = deque(other for other in self._waiting if not other.is_over)
            if len(self._waiting) >= self._max_waiting:
                raise QueueFullError(
                    f"{count(len(self._waiting), 'request is', 'requests are')} waiting, which is "
                    "the limit; try later"
                )
            self._waiting.append(pending)
            # A batch that waits for others is woken when it is full; it looks by itself before.
            if len(self._waiting) == 1 or len(self._waiting) >= self._limit:
                self._changed.notify()

    def close(self) -> None:
        """Refuse what waits, let the running batch end, and wait for that."""
        with self._changed:
            self._closed.set()
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        try:
            self._answer_all()
        except BaseException as exc:  # not a batch's: how many it may hold could not be found out
            logger.critical("the thread that answers batches has died", exc_info=exc)
            self.failure = f"the thread that answers batches has died of {type(exc).__name__}"
        with self._changed:
            self._closed.set()
        error = self._closed_error()
        self._deliver([(pending, error) for pending in self._waiting])
        self._waiting.clear()

    def _closed_error(self) -> EngineShutdownError:
        return EngineShutdownError(self.failure or "the service is stopping")

    def _answer_all(self) -> None:
        while batch := self._next_batch():
            self.num_running = len(batch)
            self.batch_sizes[len(batch)] += 1
            started_s = time.monotonic()
            self._answer(batch)
            took_s = time.monotonic() - started_s
            self._quiet_s = min(took_s, QUIET * self._max_latency_s)
            self.num_running = 0

    def _next_batch(self) -> list[Pending]:
        """Wait for the next batch; an empty one means that the batcher is closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed.is_set())
                if self._closed.is_set():
                    return []
            self._limit = max(1, self._batch_limit())  # may ask the system: not under the lock
            with self._changed:
                self._wait_until_full()
                if self._closed.is_set():
                    return []
                batch: list[Pending] = []
                while self._waiting and len(batch) < self._limit:
                    pending = self._waiting.popleft()
                    if not pending.is_over:
                        batch.append(pending)
                if batch:
                    return batch

    def _wait_until_full(self) -> None:
        """Or until nobody else comes, or the oldest has waited long enough. Holds the lock."""
        num_before = 0
        while num_before < len(self._waiting) < self._limit and not self._closed.is_set():
            num_before = len(self._waiting)
            rest_s = self._waiting[0].arrived + self._max_latency_s - time.monotonic()
            if rest_s <= 0:
                return
            self._changed.wait(min(rest_s, self._quiet_s))

    def _answer(self, batch: list[Pending]) -> None:
        try:
            answers = self._run_batch(batch)
        except BaseException as exc:  # every request of the batch gets it; this thread goes on
            answers = [to_exception(exc)] * len(batch)
        if len(answers) != len(batch):
            wrong = EngineError(
                f"the runner gave {count(len(answers), 'answer')} to {count(len(batch), 'request')}"
            )
            answers = [wrong] * len(batch)
        self._deliver(list(zip(batch, answers, strict=True)))
