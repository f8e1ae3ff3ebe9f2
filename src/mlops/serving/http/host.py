"""The one runner behind a service: loading it beside the event loop, asking it, unloading it.

`start` returns at once; a thread makes and loads the runner. Requests wait until it is loaded,
within their time: one process of several may be ready before the others. Before `start`, after
`stop` and when loading has failed they get 503.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
import inspect
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from starlette.requests import ClientDisconnect

from mlops.engine import to_exception
from mlops.errors import DeadlineExceededError, EngineShutdownError, MLOpsError
from mlops.serving.http.batcher import Batcher, Pending
from mlops.serving.runner.base import Prediction, Runner

logger = logging.getLogger(__name__)


class Status(enum.StrEnum):
    """What `/health` says."""

    STOPPED = "stopped"
    LOADING = "loading"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"


class RunnerHost:
    """Loads one runner and shares it between the requests of a process.

    Args:
        make_runner: makes the runner, unloaded; called in the loading thread.
        max_batch_size: how many requests are answered together; a function is asked each time.
        max_latency_ms: the longest a request waits for its batch to fill.
        max_waiting: requests that may wait before new ones get 429.
        timeout_s: the longest a request may take, waiting included.
        on_loaded, on_failure: told how loading ended.
    """

    def __init__(
        self,
        make_runner: Callable[[], Runner],
        *,
        max_batch_size: int | Callable[[], int] = 1,
        max_latency_ms: float = 0,
        max_waiting: int = 256,
        timeout_s: float = 300,
        on_loaded: Callable[[], None] | None = None,
        on_failure: Callable[[Exception], None] | None = None,
    ) -> None:
        self._make_runner = make_runner
        self._batch_limit = max_batch_size if callable(max_batch_size) else lambda: max_batch_size
        self._max_latency_ms = max_latency_ms
        self._max_waiting = max_waiting
        self._on_loaded = on_loaded
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._loading_ended = threading.Event()
        self._status = Status.STOPPED
        self.timeout_s = timeout_s
        self.runner: Runner | None = None
        self.batcher: Batcher | None = None
        self.failure: Exception | None = None
        self._can_cancel = False

    @property
    def status(self) -> Status:
        """Healthy only while the model is loaded."""
        if self._status is Status.HEALTHY and not (self.runner and self.runner.is_loaded):
            return Status.UNHEALTHY
        return self._status

    def start(self) -> None:
        """Begin to load. Does nothing when that was begun."""
        with self._lock:
            if self._status is not Status.STOPPED:
                return
            self._status = Status.LOADING
            self.failure = None
            self._loading_ended.clear()
            self.batcher = Batcher(
                self._run_batch,
                batch_limit=self._batch_limit,
                max_latency_ms=self._max_latency_ms,
                max_waiting=self._max_waiting,
            )
        threading.Thread(target=self._load, name="mlops-load", daemon=True).start()

    def stop(self) -> None:
        """Refuse what waits, end the running batch, unload. Does nothing when stopped."""
        with self._lock:
            self._status = Status.STOPPED
            runner, batcher = self.runner, self.batcher
            self.runner = self.batcher = None
            self._loading_ended.set()
        if batcher:
            batcher.close()
        if runner:
            runner.unload_model()

    def _load(self) -> None:
        started = time.monotonic()
        try:
            runner = self._make_runner()
            runner.load_model()
        except BaseException as exc:  # kept, told, and shown by /health
            self._fail(to_exception(exc))
            return
        with self._lock:
            if self._status is not Status.LOADING:  # stopped meanwhile
                unwanted = runner
            else:
                unwanted = None
                self.runner = runner
                # A runner may be able to stop in the middle of what nobody waits for any more.
                self._can_cancel = (
                    "is_cancelled" in inspect.signature(runner.predict_batch).parameters
                )
                self._status = Status.HEALTHY
                self._loading_ended.set()
        if unwanted:
            unwanted.unload_model()
            return
        logger.info("model loaded in %.1f s", time.monotonic() - started)
        if self._on_loaded:
            self._on_loaded()

    def _fail(self, exc: Exception) -> None:
        with self._lock:
            if self._status is not Status.LOADING:
                return
            self._status = Status.UNHEALTHY
            self.failure = exc
            self._loading_ended.set()
        expected = isinstance(exc, MLOpsError)  # its message says all
        logger.error("the model could not be loaded: %s", exc, exc_info=None if expected else exc)
        if self._on_failure:
            self._on_failure(exc)

    async def predict(
        self,
        input_data: Mapping[str, Any],
        disconnected: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> Prediction:
        """Answer one request.

        Args:
            input_data: the request's fields, as the runner takes them.
            disconnected: an async function that returns when the client has left.

        Raises:
            EngineShutdownError: no model is loaded, and none is being loaded.
            QueueFullError: too many requests wait.
            DeadlineExceededError: `timeout_s` is over; the work is given up.
            ClientDisconnect: the client has left; the work is given up.
        """
        batcher = self.batcher
        if self.status not in {Status.LOADING, Status.HEALTHY} or batcher is None:
            raise EngineShutdownError(f"the model is not ready: the service is {self.status.value}")
        pending = Pending(input_data, time.monotonic() + self.timeout_s)
        batcher.submit(pending)
        answer = asyncio.ensure_future(asyncio.wrap_future(pending.answer))
        waited_for: set[asyncio.Future[Any]] = {answer}
        if disconnected:
            waited_for.add(asyncio.ensure_future(disconnected()))
        try:
            await asyncio.wait(
                waited_for, timeout=self.timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if answer.done() and not answer.cancelled():
                return answer.result()
            if any(other.done() for other in waited_for - {answer}):
                raise ClientDisconnect
            raise DeadlineExceededError(f"no answer within {self.timeout_s:g} s")
        finally:
            pending.abandoned.set()
            for task in waited_for:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    def _run_batch(self, batch: Sequence[Pending]) -> Sequence[Prediction | Exception]:
        self._loading_ended.wait()
        runner = self.runner
        if runner is None:
            raise EngineShutdownError(f"the model is not ready: the service is {self.status.value}")
        inputs = [pending.input_data for pending in batch]
        predict_batch: Callable[..., list[Prediction | Exception]] = runner.predict_batch
        if self._can_cancel:
            watchers = [functools.partial(getattr, pending, "is_over") for pending in batch]
            return predict_batch(inputs, is_cancelled=watchers)
        return predict_batch(inputs)
