"""Server-sent events: a response that is written as it comes, and ends when nobody reads it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, Callable

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlops.errors import DeadlineExceededError
from mlops.serving.http.waiting import disconnection, while_wanted

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
GRACE_S = 10.0
"""After a request's deadline, for its last events to be read."""


class EventStream(Response):
    """Sends events until they end, the client leaves or the request's time is long over.

    Starlette's own streaming response waits for ever on a client that stays and does not read.

    Args:
        events: whole events in bytes; each is one write.
        release: called once, whatever happens, as soon as the response is over.
        deadline_s: of `time.monotonic()`; the request's time.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], *, release: Callable[[], None], deadline_s: float
    ) -> None:
        # The last header asks a reverse proxy not to collect what it passes on.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._release = release
        self._deadline_s = deadline_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_wanted(
                self._write(send), disconnection(receive), self._deadline_s + GRACE_S
            )
        except ClientDisconnect:
            pass
        except DeadlineExceededError:
            # The server closes a connection whose response has no end.
            logger.warning("a client did not read its answer in time; its connection is closed")
        finally:
            self._release()

    async def _write(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        async with contextlib.aclosing(self._events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
