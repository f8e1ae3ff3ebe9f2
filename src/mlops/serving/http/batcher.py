"""Requests that arrive together are answered together.

One thread takes waiting requests in their order, as many as a batch may hold, and hands them to the
runner. A batch goes when it is full or when its oldest request has waited `max_latency_ms`. Nothing
of this happens on the event loop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from mlops.engine import to_exception
from mlops.errors import EngineError, EngineShutdownError, QueueFullError
from mlops.serving.runner.base import Prediction

logger = logging.getLogger(__name__)

RunBatch = Callable[[Sequence["Pending"]], Sequence[Prediction | Exception]]


@dataclass(eq=False)
class Pending:
    """One request: what was asked, where the answer goes, and whether anyone still waits for it."""

    input_data: Mapping[str, Any]
    deadline: float  # of time.monotonic()
    arrived: float = field(default_factory=time.monotonic)
    answer: Future[Prediction] = field(default_factory=Future)
    is_abandoned: bool = False

    @property
    def is_over(self) -> bool:
        """True when the client has left or its time is over: computing on would be for nobody."""
        return self.is_abandoned or time.monotonic() >= self.deadline


class Batcher:
    """Collects requests into batches for one runner.

    Args:
        run_batch: answers several requests in their order; called in the batcher's thread.
        batch_limit: how many requests a batch may hold now; asked before each batch.
        max_latency_ms: the longest a request waits for its batch to fill; 0 starts at once.
        max_waiting: how many requests may wait before new ones are refused.
    """

    def __init__(
        self,
        run_batch: RunBatch,
        *,
        batch_limit: Callable[[], int],
        max_latency_ms: float,
        max_waiting: int,
    ) -> None:
        self._run_batch = run_batch
        self._batch_limit = batch_limit
        self._max_latency_s = max_latency_ms / 1000
        self._max_waiting = max_waiting
        self._waiting: deque[Pending] = deque()
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self.num_running = 0
        self.batch_sizes: Counter[int] = Counter()
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
                raise EngineShutdownError("the service is stopping")
            if len(self._waiting) >= self._max_waiting:
                self._waiting = deque(other for other in self._waiting if not other.is_over)
            if len(self._waiting) >= self._max_waiting:
                raise QueueFullError(
                    f"{len(self._waiting)} requests are waiting, which is the limit; try later"
                )
            self._waiting.append(pending)
            self._changed.notify()

    def close(self) -> None:
        """Refuse what waits, let the running batch end, and wait for that."""
        with self._changed:
            self._closed.set()
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next_batch():
            self.num_running = len(batch)
            self.batch_sizes[len(batch)] += 1
            self._answer(batch)
            self.num_running = 0
        for pending in self._waiting:
            if pending.answer.set_running_or_notify_cancel():
                pending.answer.set_exception(EngineShutdownError("the service is stopping"))
        self._waiting.clear()

    def _next_batch(self) -> list[Pending]:
        """Wait for the next batch; an empty one means that the batcher is closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed.is_set())
                if self._closed.is_set():
                    return []
            limit = max(1, self._batch_limit())  # may ask the system: not under the lock
            with self._changed:
                if self._waiting:
                    rest_s = self._waiting[0].arrived + self._max_latency_s - time.monotonic()
                    self._changed.wait_for(
                        lambda: self._closed.is_set() or len(self._waiting) >= limit,  # noqa: B023
                        timeout=max(0.0, rest_s),
                    )
                if self._closed.is_set():
                    return []
                batch: list[Pending] = []
                while self._waiting and len(batch) < limit:
                    pending = self._waiting.popleft()
                    if pending.is_over:
                        pending.answer.cancel()
                    elif pending.answer.set_running_or_notify_cancel():
                        batch.append(pending)
                if batch:
                    return batch

    def _answer(self, batch: list[Pending]) -> None:
        try:
            answers = self._run_batch(batch)
        except BaseException as exc:  # every request of the batch gets it; this thread goes on
            answers = [to_exception(exc)] * len(batch)
        if len(answers) != len(batch):
            wrong = EngineError(f"the runner gave {len(answers)} answers to {len(batch)} requests")
            answers = [wrong] * len(batch)
        for pending, answer in zip(batch, answers, strict=True):
            if isinstance(answer, Exception):
                pending.answer.set_exception(answer)
            else:
                pending.answer.set_result(answer)
