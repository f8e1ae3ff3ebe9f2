"""The one thread that does all MLX work: load, generate, destroy.

MLX's streams belong to threads, and arrays that two threads use at once crash the process. So every
function that touches MLX runs here, one after the other, in the order in which it was handed over.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from mlops.errors import EngineError, EngineShutdownError, sentence_of

Params = ParamSpec("Params")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)

EXIT_TIMEOUT_S = 10.0
_GIVEN_UP = "the work under way did not end within %g s; it is given up"
"""How long the interpreter's exit waits for the work that is under way."""


DEAD = "the thread that does all MLX work has died: restart the process"
"""What it died of is for the log, and for `owner_failure`."""


class _Owner:
    """A daemon thread that works through a queue of calls."""

    def __init__(self) -> None:
        self.process_id = os.getpid()
        self.is_stopping = False
        self.failure: str | None = None
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._unanswered: set[Future[Any]] = set()
        self.thread = threading.Thread(target=self._work, name="mlx-owner", daemon=True)
        self.thread.start()

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = call()
            except BaseException as exc:
                _clear_frames(exc)
                future.set_exception(to_exception(exc))
            else:
                future.set_result(result)

        if self.is_stopping:
            raise EngineShutdownError("the interpreter is exiting; nothing more is computed")
        if self.failure is not None:
            raise EngineShutdownError(DEAD)
        self._unanswered.add(future)
        future.add_done_callback(self._unanswered.discard)
        self._calls.put(run)
        self._fail_when_dead()  # it may have died meanwhile
        return future

    def stop(self) -> None:
        """Let the call under way end at its next step, drop the others and end the thread."""
        self.is_stopping = True
        self._calls.put(None)
        self.thread.join(EXIT_TIMEOUT_S)
        if self.thread.is_alive():
            logger.error(_GIVEN_UP, EXIT_TIMEOUT_S)
            leave_at_once()
        # Before Python 3.13 `join` does not wait for the destructors of MLX's thread-local
        # compile cache. They take the GIL, which aborts the process once Python finalizes.
        deadline = time.monotonic() + EXIT_TIMEOUT_S
        while _exists_in_system(self.thread) and time.monotonic() < deadline:
            time.sleep(0.001)

    def _work(self) -> None:
        try:
            while (run := self._calls.get()) is not None and not self.is_stopping:
                run()
                del run  # or the last call's arguments would live until the next call
        except BaseException as exc:
            logger.critical("nothing more can be computed", exc_info=exc)
            # The arrays belong to this thread: another one could not go on with them.
            self.failure = f"the thread that does all MLX work has died of {sentence_of(exc)}"
            self._fail_when_dead()

    def _fail_when_dead(self) -> None:
        if self.failure is None:
            return
        for future in list(self._unanswered):
            with contextlib.suppress(InvalidStateError):  # it has been answered meanwhile
                future.set_exception(EngineShutdownError(DEAD))


_current: _Owner | None = None
_lock = threading.Lock()


def run_in_owner(
    function: Callable[Params, Result], /, *args: Params.args, **kwargs: Params.kwargs
) -> Result:
    """Call `function` in the owner thread and return what it returns, or raise what it raises.

    Called from the owner thread itself, it is a plain call.
    """
    if in_owner():
        return function(*args, **kwargs)
    return submit_to_owner(function, *args, **kwargs).result()


def submit_to_owner(
    function: Callable[Params, Result], /, *args: Params.args, **kwargs: Params.kwargs
) -> Future[Result]:
    """Queue a call of `function` in the owner thread; calls run in the order of submission.

    Raises:
        EngineShutdownError: the interpreter is exiting, or the thread has died. The future raises
            it when it dies before the call.
    """
    owner = _find_owner()
    return cast("Future[Result]", owner.submit(lambda: function(*args, **kwargs)))


def in_owner() -> bool:
    """True in the owner thread."""
    return _current is not None and threading.current_thread() is _current.thread


def is_stopping() -> bool:
    """True when the interpreter exits: long work is to end at its next step."""
    return _current is not None and _current.is_stopping


def owner_failure() -> str | None:
    """Why nothing can be computed any more in this process; None as long as it can."""
    return None if _current is None else _current.failure


def check_stopping() -> None:
    """Call between the steps of long work.

    Raises:
        EngineShutdownError: the interpreter exits.
    """
    if is_stopping():
        raise EngineShutdownError("the interpreter is exiting; nothing more is computed")


def to_exception(exc: BaseException) -> Exception:
    """The exception itself, or an `EngineError` for what is none: SystemExit, a panic in Rust.

    What is no `Exception` would end the thread of whoever waits for the answer.
    """
    if isinstance(exc, Exception):
        return exc
    error = EngineError(sentence_of(exc))
    error.__cause__ = exc
    return error


def _find_owner() -> _Owner:
    global _current  # noqa: PLW0603 - one owner a process is the point
    with _lock:
        # A forked child has its parent's variables but not its threads.
        if _current is None or _current.process_id != os.getpid():
            _current = _Owner()
            atexit.register(_current.stop)
        return _current


def leave_at_once() -> None:
    """End the process with a failure, although a thread of it computes on or is missing.

    Python's own end would abort it: a thread that wants the GIL then cannot be unwound through C++.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
            stream.flush()
    os._exit(1)


def _exists_in_system(thread: threading.Thread) -> bool:
    """Whether the operating system still has an ended thread; False where it does not tell."""
    return Path(f"/proc/self/task/{thread.native_id}").exists()


def _clear_frames(exc: BaseException) -> None:
    """Drop the local variables that an exception's traceback holds: arrays must die here."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [exc]
    while pending:
        current = pending.pop()
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            traceback.clear_frames(current.__traceback__)
            pending += [current.__cause__, current.__context__]
