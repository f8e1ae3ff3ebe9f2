"""How `bentoml serve` ends: what runs is finished, and nobody is left without an answer.

    SIGTERM -> /readyz says no -> `shutdown_delay` -> no new connections -> what runs finishes
            -> `shutdown_timeout` -> what is left gets an error -> the process ends, with status 0

SIGINT (Ctrl-C), and a second SIGTERM, skip to the error; so does a model that has broken, and then
the status is 1. This holds for a worker alone, for the command with all of its workers, and for the
process group: a worker may get the same signal twice.
uvicorn's server is found by the signal handler that it has installed, and told through attributes
that are there for it; the same goes for the command's arbiter. Under any other server nothing
happens here.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import faulthandler
import logging
import math
import os
import shutil
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

from mlops.engine.owner import leave_at_once
from mlops.serving.bentoml import supervision

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette

    from mlops.serving.bentoml.http_options import HTTPOptions
    from mlops.serving.http import RunnerHost

logger = logging.getLogger(__name__)

LAST_WORDS_S = 3.0
"""For clients to read the error that ends their request."""

_LOOK_AFTER_COMMAND_S = 1.0
EXIT_S = 10.0
"""For a process whose requests are over; one that hangs then is ended with its stacks printed."""

UNLOAD_S = 5.0
"""For a model whose requests are over."""

OnDeath = Callable[..., bool]
"""As `supervision.Deaths.on_death`."""

_LISTENER = "_bento_api_server"  # BentoML's name of the socket that clients connect to


def ending_well(app: Starlette, host: RunnerHost, options: HTTPOptions) -> Starlette:
    """Let the process that serves this app end as the module says; returns the app."""
    lifespan = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def around(scope: Any) -> AsyncIterator[Any]:
        server = _running_server()
        async with contextlib.AsyncExitStack() as stack:
            with supervision.noting_failures():
                state = await stack.enter_async_context(lifespan(scope))
            if server is not None:
                await stack.enter_async_context(_ending(server, host, options))
            yield state
        if server is not None and host.is_broken:  # it did not unload
            atexit.register(leave_at_once)

    app.router.lifespan_context = around
    return app


@contextlib.asynccontextmanager
async def _ending(
    server: uvicorn.Server, host: RunnerHost, options: HTTPOptions
) -> AsyncIterator[None]:
    from mlops.serving.bentoml.connections import watched

    given = server.config.timeout_graceful_shutdown  # the command line's
    ending = Ending(
        server,
        host,
        delay_s=options.shutdown_delay,
        timeout_s=options.shutdown_timeout if given is None else given,
    )
    async with watched(server, host):
        ending.install()
        host.on_broken = ending.on_broken
        watching = asyncio.create_task(_end_without_command(ending, os.getppid()))
        try:
            yield
        finally:
            watching.cancel()
            ending.close()


async def _end_without_command(ending: Ending, command: int) -> None:
    """End this worker when the command that has started it was killed: nobody else would.

    Args:
        command: its process id.
    """
    folder = supervision.folder()
    if folder is None:
        return
    while os.getppid() == command:
        await asyncio.sleep(_LOOK_AFTER_COMMAND_S)
    logger.error("the command that started this worker, process %d, is gone: it ends", command)
    shutil.rmtree(folder, ignore_errors=True)  # it cannot any more
    ending.begin(at_once=False)


class Ending:
    """What a worker does when it is asked to end.

    Args:
        delay_s: new connections are still taken for so long.
        timeout_s: then, what runs may take so long.
    """

    def __init__(
        self, server: uvicorn.Server, host: RunnerHost, *, delay_s: float, timeout_s: float
    ) -> None:
        self._server = server
        self._host = host
        self._delay_s = delay_s
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._is_at_once = False

    def install(self) -> None:
        """Take the signals over from uvicorn, which gives them back to whom it took them from."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def begin(self, *, at_once: bool) -> None:
        """End; called in the event loop, any number of times."""
        if self._task is not None and (self._is_at_once or not at_once):
            return
        if self._task is not None:
            self._task.cancel()
        self._is_at_once = at_once
        self._host.is_draining = True
        self._task = asyncio.create_task(self._end_at_once() if at_once else self._drain())

    def on_broken(self) -> None:
        """End at once, whatever becomes of what computes; called in the event loop."""
        atexit.register(leave_at_once)  # runs before what would wait for the model
        self.begin(at_once=True)

    def close(self) -> None:
        """Called when no request is left."""
        if self._task is not None:
            self._task.cancel()

    def _on_signal(self, number: int, _: Any) -> None:
        # Under the command a second SIGTERM may be the first one once more, sent on by it.
        is_repeated = self._host.is_draining and not supervision.is_supervised()
        at_once = number == signal.SIGINT or is_repeated
        self._loop.call_soon_threadsafe(lambda: self.begin(at_once=at_once))

    async def _drain(self) -> None:
        logger.info("asked to end: running requests have %g s", self._timeout_s)
        _end_if_stuck(self._delay_s + self._timeout_s + LAST_WORDS_S + EXIT_S)
        await asyncio.sleep(self._delay_s)
        # After this time uvicorn cancels what is left: clients that do not read their error.
        self._server.config.timeout_graceful_shutdown = math.ceil(self._timeout_s + LAST_WORDS_S)
        self._server.should_exit = True
        await asyncio.sleep(self._timeout_s)
        self._host.end_requests()

    async def _end_at_once(self) -> None:
        _end_if_stuck(LAST_WORDS_S + EXIT_S)
        self._host.end_requests()
        self._server.should_exit = True
        await asyncio.sleep(LAST_WORDS_S)
        self._server.force_exit = True


@contextlib.contextmanager
def signals_watched(on_death: OnDeath) -> Iterator[threading.Event]:
    """In the process of the command, while its arbiter runs; what it gives is set at a signal.

    The arbiter passes a first signal on to the workers as SIGTERM, waits for them for a day, and
    keeps the address open meanwhile. In this block the address is given up at the first signal,
    and SIGINT and a second signal reach the workers as SIGINT. When a worker has died, the arbiter
    looks at once, and not up to 10 s later. Main thread only.

    Args:
        on_death: told of each; True ends the server.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # Only a signal that has a handler is written to the pipe.
    child_before = signal.signal(signal.SIGCHLD, lambda *_: None)
    was_asked = threading.Event()
    watcher = threading.Thread(
        target=_watch, args=(reading, was_asked, on_death), name="mlops-signals", daemon=True
    )
    watcher.start()
    try:
        yield was_asked
    finally:
        signal.signal(signal.SIGCHLD, child_before)
        signal.set_wakeup_fd(before)
        os.close(writing)
        watcher.join()
        os.close(reading)


def _watch(reading: int, was_asked: threading.Event, on_death: OnDeath) -> None:
    while numbers := os.read(reading, 64):
        for number in numbers:
            arbiter = running_arbiter()
            if arbiter is None:
                continue
            if number == signal.SIGCHLD:
                arbiter.loop.add_callback(_look_after_workers, arbiter, on_death)
            if number not in {signal.SIGTERM, signal.SIGINT}:
                continue
            arbiter.loop.add_callback(_stop_listening, arbiter)
            arbiter.loop.add_callback(_stop, arbiter)  # circus drops a signal when it is busy
            if was_asked.is_set() or number == signal.SIGINT:
                _interrupt_workers(arbiter)
            was_asked.set()


def _stop_listening(arbiter: Any) -> None:
    # The workers have the socket too: when they have closed it, clients are refused.
    if listener := arbiter.sockets.get(_LISTENER):
        listener.close()


async def _look_after_workers(arbiter: Any, on_death: OnDeath) -> None:
    from circus.exc import ConflictError

    def after_reap(*, watcher: Any, process_pid: int, exit_code: int, **_: Any) -> None:
        is_last = not watcher.respawn and not watcher.processes
        if watcher.is_active() and on_death(watcher.name, process_pid, exit_code, is_last=is_last):
            arbiter.loop.add_callback(_stop, arbiter)

    for watcher in arbiter.watchers:
        watcher.hooks["after_reap"] = after_reap
    # One that is being restarted has no processes for a moment, which ends an arbiter that looks.
    if all(watcher.is_active() for watcher in arbiter.watchers):
        with contextlib.suppress(ConflictError):  # it is looking
            await arbiter.manage_watchers()


async def _stop(arbiter: Any) -> None:
    from circus.exc import ConflictError

    while arbiter.running and not arbiter._stopping:
        try:
            await arbiter.stop()
        except ConflictError:  # it is doing something else, such as to look after workers
            await asyncio.sleep(0.1)
        else:
            return


def _interrupt_workers(arbiter: Any) -> None:
    for watcher in list(arbiter.watchers):
        for process_id in list(watcher.processes):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGINT)


def running_arbiter() -> Any:
    """circus's arbiter in this process, once it has installed its signal handlers."""
    handler = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return getattr(getattr(handler, "controller", None), "arbiter", None)


def _running_server() -> uvicorn.Server | None:
    """uvicorn's server whose lifespan this is, when it serves in the main thread."""
    import uvicorn

    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    is_main = threading.current_thread() is threading.main_thread()
    return server if is_main and isinstance(server, uvicorn.Server) else None


def _end_if_stuck(after_s: float) -> None:
    # A thread of its own in C: it needs no lock that a stuck computation may hold.
    faulthandler.dump_traceback_later(after_s, exit=True, file=2)
