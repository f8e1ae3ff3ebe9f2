"""Work that goes on only while somebody waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect

from mlops.errors import DeadlineExceededError

T = TypeVar("T")
Disconnected = Callable[[], Coroutine[Any, Any, None]]
"""An async function that returns when the client has left."""


def disconnection(receive: Callable[[], Awaitable[Any]]) -> Disconnected:
    """Watches an ASGI `receive` whose request body has been read."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    return disconnected


async def while_wanted(
    work: Coroutine[Any, Any, T], disconnected: Disconnected | None, deadline_s: float
) -> T:
    """Run `work` until it ends, its client leaves or its time is over; then it is cancelled.

    Args:
        work: cleans up after itself when it is cancelled.
        disconnected: None where nobody can tell.
        deadline_s: of `time.monotonic()`.

    Raises:
        ClientDisconnect: the client has left.
        DeadlineExceededError: the time is over.
    """
    allowed_s = deadline_s - time.monotonic()
    task = asyncio.ensure_future(work)
    tasks: set[asyncio.Future[Any]] = {task}
    if disconnected:
        tasks.add(asyncio.ensure_future(disconnected()))
    try:
        ended, _ = await asyncio.wait(
            tasks, timeout=max(0.0, allowed_s), return_when=asyncio.FIRST_COMPLETED
        )
        if task in ended and not task.cancelled():
            return task.result()
        if ended - {task}:
            raise ClientDisconnect
        raise DeadlineExceededError(f"no answer within {round(allowed_s, 2):g} s")
    finally:
        for one in tasks:
            one.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
