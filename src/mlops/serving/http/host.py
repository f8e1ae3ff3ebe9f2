"""The one runner behind a service: loading it beside the event loop, asking it, unloading it.

`start` returns at once; a thread makes and loads the runner. Requests wait until it is loaded,
within their time: one process of several may be ready before the others. Before `start`, after
`stop` and when loading has failed they get 503. Then a `TextRunner` is asked at once, for its
requests join and leave a running batch; any other runner is asked through the `Batcher`.

What is loaded may break: the thread that computes dies, or hangs in one call. `check` finds out,
and `watch` tells those who wait.
"""

from __future__ import annotations

import asyncio
import enum
import functools
import inspect
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.exceptions import HTTPException

from mlops.counts import count
from mlops.engine import to_exception
from mlops.errors import EngineShutdownError, MLOpsError, QueueFullError, ServiceError
from mlops.serving.http.batcher import Batcher, Pending
from mlops.serving.http.progress import Progress
from mlops.serving.http.several import Several
from mlops.serving.http.waiting import Disconnected, UnderWay, while_wanted
from mlops.serving.runner.base import Generating, Prediction, Runner, TextChunk, TextRunner

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

CHECK_EVERY_S = 1.0
"""How soon a thread that died is noticed, where nobody asks for the health."""

STUCK_AFTER_S = 60.0
"""An engine that makes no step for so long, with requests to answer, hangs. The longest steps are
the first ones, which may compile kernels: 20 s on a slow machine."""

BROKEN = "the model has stopped working and is started again: ask again later, or elsewhere"
"""What clients are told; the reason is in `/health` and in the log."""

Inputs = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""A request's fields, as the runner takes them; or those of several that are answered as one."""


class Status(enum.StrEnum):
    """What `/health` says."""

    STOPPED = "stopped"
    LOADING = "loading"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"


@dataclass(eq=False)
class TextStream:
    """A request under way whose first chunk is there.

    Attributes:
        deadline_s: of `time.monotonic()`; the request's time.
        under_way: it is one of these; `ended` is its mark there.
    """

    generating: Generating
    first: TextChunk | None
    rest: AsyncIterator[TextChunk]
    deadline_s: float
    under_way: UnderWay
    ended: asyncio.Future[None]

    def __post_init__(self) -> None:
        self._reader: asyncio.Task[Any] | None = None  # while it waits for a chunk
        self.ended.add_done_callback(self._on_end)

    async def chunks(self) -> AsyncIterator[TextChunk]:
        """All chunks; raises the request's error."""
        last = self.first
        if last is not None:
            yield last
        while (chunk := await self._next()) is not None:
            if self._is_cut_off(chunk):
                raise self.under_way.error()
            last = chunk
            yield chunk
        if self._is_cut_off(last):
            raise self.under_way.error()

    async def prediction(self) -> Prediction:
        """The whole answer, once the chunks have ended."""
        return await self.generating.prediction()

    def cancel(self) -> None:
        """End the generation, wherever it is."""
        self.under_way.end(self.ended)
        self.generating.cancel()

    async def _next(self) -> TextChunk | None:
        if self.under_way.is_hopeless:
            raise self.under_way.error()
        self._reader = reader = asyncio.current_task()
        try:
            return await anext(self.rest, None)
        except asyncio.CancelledError:
            if reader is None or self._reader is not None:
                raise
            reader.uncancel()  # it was `_on_end`
            raise self.under_way.error() from None
        finally:
            self._reader = None

    def _on_end(self, _: asyncio.Future[None]) -> None:
        self.generating.cancel()
        if self.under_way.is_hopeless and (reader := self._reader):
            self._reader = None
            reader.cancel()

    def _is_cut_off(self, last: TextChunk | None) -> bool:
        """Whether this is the last chunk because the service shuts down."""
        reason = last.finish_reason if last else None
        return self.under_way.is_over and reason in {None, "cancelled"}


class RunnerHost:
    """Loads one runner and shares it between the requests of a process.

    Args:
        make_runner: makes the runner, unloaded; called in the loading thread.
        max_batch_size: how many requests a batch holds; a function is asked each time.
        max_latency_ms: the longest a request waits for its batch to fill.
        max_waiting: requests that may wait before new ones get 429, for the model to load or for
            a batch.
        timeout_s: the longest a request may take, waiting included.
        stuck_after_s: a language model that makes no step for so long, with requests to answer,
            is broken. Any other model may take `timeout_s` for a batch where that is longer.
        complete: called with the loaded runner, in the loading thread, before requests reach it.
        on_loaded, on_failure: told how loading ended; without `on_failure` it is logged.
    """

    def __init__(
        self,
        make_runner: Callable[[], Runner],
        *,
        max_batch_size: int | Callable[[], int] = 1,
        max_latency_ms: float = 0,
        max_waiting: int = 256,
        timeout_s: float = 300,
        stuck_after_s: float = STUCK_AFTER_S,
        complete: Callable[[Runner], None] | None = None,
        on_loaded: Callable[[], None] | None = None,
        on_failure: Callable[[Exception], None] | None = None,
    ) -> None:
        self._make_runner = make_runner
        self._batch_limit = max_batch_size if callable(max_batch_size) else lambda: max_batch_size
        self._max_latency_ms = max_latency_ms
        self._max_waiting = max_waiting
        self._complete = complete
        self._on_loaded = on_loaded
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._loading_ended = _running_future()
        self._num_waiting_for_model = 0
        self._status = Status.STOPPED
        self.timeout_s = timeout_s
        self.stuck_after_s = stuck_after_s
        self.on_broken: Callable[[], None] | None = None  # called in the event loop
        self.runner: Runner | None = None
        # Once the model is loaded, requests go to one of these.
        self.text_runner: TextRunner | None = None
        self.batcher: Batcher | None = None
        self.failure: Exception | None = None
        self.is_broken = False  # it was loaded, and will never answer again: only a restart helps
        self._progress = Progress()
        self._check_has_failed = False
        self._under_way = UnderWay()
        self.is_draining = False  # new clients should go elsewhere: `/readyz` says so

    @property
    def status(self) -> Status:
        """Healthy only while the model is loaded and not known to be broken."""
        if self.is_broken and self._status is not Status.STOPPED:
            return Status.UNHEALTHY
        if self._status is Status.HEALTHY and not (self.runner and self.runner.is_loaded):
            return Status.UNHEALTHY
        return self._status

    @property
    def num_waiting(self) -> int:
        """Requests that wait for the model to load, or for a batch."""
        batcher = self.batcher
        return self._num_waiting_for_model + (batcher.num_waiting if batcher else 0)

    def start(self) -> None:
        """Begin to load. Does nothing when that was begun."""
        with self._lock:
            if self._status is not Status.STOPPED:
                return
            self._status = Status.LOADING
            self.failure = None
            self.is_broken = False
            self._progress = Progress()
            self._under_way = UnderWay()
            self.is_draining = False
            self._loading_ended = _running_future()
        threading.Thread(target=self._load, name="mlops-load", daemon=True).start()

    def end_requests(self) -> None:
        """End what is being answered, and what comes later, with `EngineShutdownError`.

        Called in the event loop when a service has given its requests the time it has.
        """
        self._under_way.end_all()

    def check(self) -> None:
        """Look whether what is loaded still works, and remember it when it does not."""
        if self._status is not Status.HEALTHY or self.is_broken:
            return
        try:
            reason = self._reason_broken()
            self._check_has_failed = False
        except Exception:  # a runner's own code: the next time it may work
            if not self._check_has_failed:
                logger.exception("the runner's health could not be checked")
            self._check_has_failed = True
            return
        if reason is not None:
            self._break(reason)

    async def watch(self) -> None:
        """Check every second; when the model has broken, end all requests and return."""
        while not self.is_broken:
            await asyncio.sleep(CHECK_EVERY_S)
            self.check()
        self._under_way.end_all(BROKEN, is_hopeless=True)
        if self.on_broken:
            self.on_broken()

    def _reason_broken(self) -> str | None:
        runner, batcher = self.runner, self.batcher
        fatal = getattr(runner, "fatal_error", None) or (batcher and batcher.failure)
        if isinstance(fatal, str):
            return fatal
        still_s = self._progress.still_s(self.text_runner, batcher)
        patience_s = self.stuck_after_s
        if self.text_runner is None:  # one batch of a custom model may take a request's whole time
            patience_s = max(patience_s, self.timeout_s)
        if still_s > patience_s:
            return f"the model has made no step for {still_s:.0f} s, with requests to answer"
        return None

    def _break(self, reason: str) -> None:
        self.failure = ServiceError(f"{reason}: only a restart helps", "serve")
        self.is_broken = True
        logger.error("%s", self.failure)

    def stop(self, timeout_s: float | None = None) -> None:
        """Refuse what waits, end what runs, unload. Does nothing when stopped.

        Args:
            timeout_s: a model that takes longer to unload is left as it is, and is broken. One that
                is known to be broken is always left.
        """
        with self._lock:
            self._status = Status.STOPPED
            runner, batcher = self.runner, self.batcher
            self.runner = self.text_runner = self.batcher = None
            self._end_loading()
        if self.is_broken:
            return

        def unload() -> None:
            if batcher:
                batcher.close()
            if runner:
                runner.unload_model()

        unloaded = _in_a_thread(unload)
        try:
            unloaded.result(timeout_s)
        except TimeoutError:
            if unloaded.done():  # the runner's own
                raise
            self._break(f"the model did not unload within {timeout_s:g} s")

    def _load(self) -> None:
        started = time.monotonic()
        try:
            runner = self._make_runner()
            runner.load_model()
            text_runner = _text_runner(runner)
            if self._complete:
                self._complete(runner)
        except BaseException as exc:  # kept, told, and shown by /health
            self._fail(to_exception(exc))
            return
        with self._lock:
            if self._status is not Status.LOADING:  # stopped meanwhile
                unwanted = runner
            else:
                unwanted = None
                self.runner = runner
                self.text_runner = text_runner
                if text_runner is None:
                    self.batcher = self._make_batcher(runner)
                self._status = Status.HEALTHY
                self._end_loading()
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
            self._end_loading()
        if self._on_failure:
            self._on_failure(exc)
        else:
            log_load_failure(exc)

    async def predict(
        self,
        input_data: Inputs,
        disconnected: Disconnected | None = None,
        *,
        text_only: bool = False,
    ) -> Prediction:
        """Answer one request.

        Args:
            input_data: what is asked; several requests of a model that generates text only.
            disconnected: an async function that returns when the client has left.
            text_only: refuse it when the model does not generate text.

        Raises:
            HTTPException: 404, the model does not generate text.
            EngineShutdownError: no model is loaded, and none is being loaded; or the service ends.
            QueueFullError: too many requests wait.
            DeadlineExceededError: `timeout_s` is over; the work is given up.
            ClientDisconnect: the client has left; the work is given up.
        """
        deadline_s = time.monotonic() + self.timeout_s

        async def answer() -> Prediction:
            await self._wait_for_model()
            if text_only or self.text_runner or not isinstance(input_data, Mapping):
                return await self._generate(input_data, deadline_s)
            return await self._ask_in_batch(input_data, deadline_s)

        return await while_wanted(answer(), disconnected, deadline_s, self._under_way)

    async def ask(
        self,
        work: Callable[[Runner, float], Coroutine[Any, Any, Result]],
        disconnected: Disconnected | None = None,
    ) -> Result:
        """Do something else with the runner, once its model is loaded.

        Args:
            work: gets the runner, and the deadline of `time.monotonic()`; cleans up after itself
                when it is cancelled.
            disconnected: an async function that returns when the client has left.

        Raises:
            MLOpsError, ClientDisconnect: as `predict`, and what the work raises.
        """
        deadline_s = time.monotonic() + self.timeout_s

        async def answer() -> Result:
            await self._wait_for_model()
            if self.runner is None:
                raise self._not_ready()
            return await work(self.runner, deadline_s)

        return await while_wanted(answer(), disconnected, deadline_s, self._under_way)

    async def stream(
        self, input_data: Inputs, disconnected: Disconnected | None = None
    ) -> TextStream:
        """Begin to answer one request and wait for its first chunk.

        So a request that is refused, also for what the tokenizer finds, is refused before anything
        is sent. The caller cancels the stream when it has done with it.

        Raises:
            HTTPException: 404, the model does not generate text.
            MLOpsError, ClientDisconnect: as `predict`, and what the runner refuses.
        """
        deadline_s = time.monotonic() + self.timeout_s
        begun: list[Generating] = []  # known here even when the rest does not come to its end

        async def begin() -> TextStream:
            await self._wait_for_model()
            generating = self._begin(input_data, deadline_s)
            begun.append(generating)
            chunks = generating.chunks()
            first = await anext(chunks, None)
            under_way = self._under_way
            ended = under_way.begin()
            return TextStream(generating, first, chunks, deadline_s, under_way, ended)

        try:
            return await while_wanted(begin(), disconnected, deadline_s, self._under_way)
        except BaseException:
            for generating in begun:
                generating.cancel()
            raise

    def _begin(self, input_data: Inputs, deadline_s: float) -> Generating:
        if self.text_runner is None:
            raise HTTPException(404, "this service's model does not generate text")
        if not isinstance(input_data, Mapping):
            return Several(self.text_runner, input_data, deadline_s)
        return self.text_runner.generate(input_data, deadline_s=deadline_s)

    async def _generate(self, input_data: Inputs, deadline_s: float) -> Prediction:
        generating = self._begin(input_data, deadline_s)
        try:
            return await generating.prediction()
        finally:
            generating.cancel()

    async def _ask_in_batch(self, input_data: Mapping[str, Any], deadline_s: float) -> Prediction:
        if self.batcher is None:
            raise self._not_ready()
        answer: asyncio.Future[Prediction] = asyncio.get_running_loop().create_future()
        pending = Pending(input_data, deadline_s, answer)
        self.batcher.submit(pending)
        try:
            return await answer
        finally:
            pending.is_abandoned = True

    async def _wait_for_model(self) -> None:
        """Return once the model is loaded.

        Raises:
            EngineShutdownError: it is not, and will not be.
            QueueFullError: too many requests wait for it.
        """
        if self._status is Status.LOADING:
            with self._lock:
                if self._num_waiting_for_model >= self._max_waiting:
                    raise QueueFullError(
                        f"{count(self._num_waiting_for_model, 'request is', 'requests are')} "
                        "waiting for the model to load, which is the limit; try later"
                    )
                self._num_waiting_for_model += 1
            try:
                await asyncio.wrap_future(self._loading_ended)
            finally:
                with self._lock:
                    self._num_waiting_for_model -= 1
        if self.status is not Status.HEALTHY:
            raise self._not_ready()

    def _not_ready(self) -> EngineShutdownError:
        if self.is_broken:
            return EngineShutdownError(BROKEN)
        return EngineShutdownError(f"the model is not ready: the service is {self.status.value}")

    def _end_loading(self) -> None:
        if not self._loading_ended.done():
            self._loading_ended.set_result(None)

    def _make_batcher(self, runner: Runner) -> Batcher:
        predict_batch: Callable[..., list[Prediction | Exception]] = runner.predict_batch
        # A runner may be able to stop in the middle of what nobody waits for any more.
        can_cancel = "is_cancelled" in inspect.signature(predict_batch).parameters

        def run_batch(batch: Sequence[Pending]) -> Sequence[Prediction | Exception]:
            inputs = [pending.input_data for pending in batch]
            if can_cancel:
                watchers = [functools.partial(getattr, pending, "is_over") for pending in batch]
                return predict_batch(inputs, is_cancelled=watchers)
            return predict_batch(inputs)

        return Batcher(
            run_batch,
            batch_limit=self._batch_limit,
            max_latency_ms=self._max_latency_ms,
            max_waiting=self._max_waiting,
        )


def _text_runner(runner: Runner) -> TextRunner | None:
    """The runner, if requests join its running batch.

    Raises:
        ServiceError: it says so, and does not have what that takes.
    """
    if not getattr(runner, "can_generate", False):
        return None
    if not isinstance(runner, TextRunner):
        raise ServiceError(
            f"{type(runner).__name__}.can_generate is true, and a method of "
            "mlops.serving.runner.base.TextRunner is missing: add it, or make can_generate false",
            "load_model",
        )
    return runner


def log_load_failure(exc: Exception) -> None:
    """With its traceback, unless its message says all."""
    expected = isinstance(exc, MLOpsError)
    logger.error("the model could not be loaded: %s", exc, exc_info=None if expected else exc)


def _in_a_thread(work: Callable[[], None]) -> Future[None]:
    """What becomes of `work` in a thread that the process's end does not wait for."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as exc:
            future.set_exception(exc)
        else:
            future.set_result(None)

    threading.Thread(target=run, name="mlops-unload", daemon=True).start()
    return future


def _running_future() -> Future[None]:
    """A future that one waiter among many cannot cancel."""
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()
    return future
