"""In front of every route: the request's id and its record, from which log and counters are fed."""

from __future__ import annotations

import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlops.serving.http.records import RequestRecord
from mlops.serving.http.served import Served


class Front:
    """ASGI middleware; see the module."""

    def __init__(self, app: ASGIApp, served: Served) -> None:
        self._app = app
        self._served = served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(uuid.uuid4().hex)
        record.put_into(scope)

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._served.requests_by_status[message["status"]] += 1
            await send(message)

        await self._app(scope, receive, send_and_note)
