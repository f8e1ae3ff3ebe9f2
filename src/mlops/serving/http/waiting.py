"""Work that goes on only while somebody waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect

from mlops.errors import DeadlineExceededError, EngineShutdownError

T = TypeVar("T")
Disconnected = Callable[[], Coroutine[Any, Any, None]]
"""An async function that returns when the client has left."""


def disconnection(receive: Callable[[], Awaitable[Any]]) -> Disconnected:
    """Watches an ASGI `receive` whose request body has been read."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    return disconnected


SHUTTING_DOWN = "the service is shutting down: ask again elsewhere or later"


class UnderWay:
    """The requests that are being answered: they can be ended together. For one event loop."""

    def __init__(self) -> None:
        self.is_over = False
        self.is_hopeless = False  # what computes them is dead: to cancel them ends nothing
        self._reason = SHUTTING_DOWN
        self._ends: set[asyncio.Future[None]] = set()

    def begin(self) -> asyncio.Future[None]:
        """A request's mark, which is done when the request is to end; give it back to `end`.

        Raises:
            EngineShutdownError: all of them have been ended.
        """
        if self.is_over:
            raise self.error()
        ended = asyncio.get_running_loop().create_future()
        self._ends.add(ended)
        return ended

    def end(self, ended: asyncio.Future[None]) -> None:
        """The request is over. Any number of times."""
        self._ends.discard(ended)
        ended.cancel()

    def end_all(self, reason: str = SHUTTING_DOWN, *, is_hopeless: bool = False) -> None:
        """End those there are, and refuse those that come; `reason` is what they are told."""
        if is_hopeless or not self.is_over:  # the first reason, or the stronger one
            self.is_over, self.is_hopeless, self._reason = True, is_hopeless, reason
        for ended in self._ends:
            if not ended.done():
                ended.set_result(None)

    def error(self) -> EngineShutdownError:
        """What a request gets that is ended for the service's sake."""
        return EngineShutdownError(self._reason)


async def while_wanted(
    work: Coroutine[Any, Any, T],
    disconnected: Disconnected | None,
    deadline_s: float,
    under_way: UnderWay | None = None,
) -> T:
    """Run `work` until it ends, its client leaves or its time is over; then it is cancelled.

    Args:
        work: cleans up after itself when it is cancelled.
        disconnected: None where nobody can tell.
        deadline_s: of `time.monotonic()`.
        under_way: what may end it for another reason.

    Raises:
        ClientDisconnect: the client has left.
        DeadlineExceededError: the time is over.
        EngineShutdownError: all requests have been ended.
    """
    task = asyncio.current_task()
    if task is None:
        work.close()
        raise RuntimeError("while_wanted is for tasks of an event loop")
    # As in `asyncio.timeout`, the work stays in this task: a second one would cost each request
    # more than all the rest of this.
    num_cancelled = task.cancelling()
    reasons: list[Exception] = []

    def give_up(reason: Exception) -> None:
        if not reasons:
            reasons.append(reason)
            task.cancel()

    def has_left(watching: asyncio.Future[None]) -> None:
        if not watching.cancelled() and watching.exception() is None:
            give_up(ClientDisconnect())

    def is_ended(ended: asyncio.Future[None]) -> None:
        if under_way and not ended.cancelled():
            give_up(under_way.error())

    def is_late() -> None:
        give_up(DeadlineExceededError(f"no answer within {round(allowed_s, 2):g} s"))

    allowed_s = deadline_s - time.monotonic()
    timer = asyncio.get_running_loop().call_later(max(0.0, allowed_s), is_late)
    ended = watching = None
    try:
        if under_way:
            ended = under_way.begin()
            ended.add_done_callback(is_ended)
        if disconnected:
            watching = asyncio.ensure_future(disconnected())
            watching.add_done_callback(has_left)
        return await work
    except asyncio.CancelledError:
        if reasons and task.cancelling() == num_cancelled + 1:  # nobody else cancels it as well
            raise reasons[0] from None
        raise
    finally:
        if reasons:
            task.uncancel()
        work.close()  # where it was not begun
        timer.cancel()
        if watching:
            watching.cancel()
        if under_way and ended:
            under_way.end(ended)
