"""A request's head, where the server leaves something of it unchecked: how many `Host` headers."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send


class OneHost:
    """ASGI middleware: a request of HTTP/1.1 has one `Host` header, an older one at most one.

    Two let a proxy and the service disagree about whom is asked (RFC 9112, 3.2). It raises an
    `HTTPException`, which `Failures` in front of it answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            num_hosts = sum(name == b"host" for name, _ in scope["headers"])
            if num_hosts > 1 or (num_hosts == 0 and scope.get("http_version") == "1.1"):
                raise HTTPException(400, f"a request has one Host header, not {num_hosts}")
        await self._app(scope, receive, send)
