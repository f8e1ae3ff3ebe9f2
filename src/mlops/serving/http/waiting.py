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


class UnderWay:
    """The requests that are being answered: they can be ended together. For one event loop."""

    def __init__(self) -> None:
        self.is_over = False
        self._ends: set[asyncio.Future[None]] = set()

    def begin(self) -> asyncio.Future[None]:
        """A request's mark, which is done when the request is to end; give it back to `end`.

        Raises:
            EngineShutdownError: all of them have been ended.
        """
        if self.is_over:
            raise shutting_down()
        ended = asyncio.get_running_loop().create_future()
        self._ends.add(ended)
        return ended

    def end(self, ended: asyncio.Future[None]) -> None:
        """The request is over. Any number of times."""
        self._ends.discard(ended)
        ended.cancel()

    def end_all(self) -> None:
        """End those there are, and refuse those that come."""
        self.is_over = True
        for ended in self._ends:
            if not ended.done():
                ended.set_result(None)


def shutting_down() -> EngineShutdownError:
    """What a request gets that is ended for the service's sake."""
    return EngineShutdownError("the service is shutting down: ask again elsewhere or later")


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
    allowed_s = deadline_s - time.monotonic()
    try:
        ended = under_way.begin() if under_way else None
    except EngineShutdownError:
        work.close()
        raise
    task = asyncio.ensure_future(work)
    tasks: set[asyncio.Future[Any]] = {task}
    if ended is not None:
        tasks.add(ended)
    if disconnected:
        tasks.add(asyncio.ensure_future(disconnected()))
    try:
        done, _ = await asyncio.wait(
            tasks, timeout=max(0.0, allowed_s), return_when=asyncio.FIRST_COMPLETED
        )
        if task in done and not task.cancelled():
            return task.result()
        if ended in done:
            raise shutting_down()
        if done - {task}:
            raise ClientDisconnect
        raise DeadlineExceededError(f"no answer within {round(allowed_s, 2):g} s")
    finally:
        if under_way and ended is not None:
            under_way.end(ended)
        for one in tasks:
            one.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
