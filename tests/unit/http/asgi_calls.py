"""One request to an ASGI app without a server: what it is sent, and what it sends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from mlops.serving.http import HTTPSettings, RunnerHost, Served, ServiceInfo
from mlops.serving.http.front import Front
from mlops.serving.http.prometheus import Metrics

App = Callable[[Any, Any, Any], Awaitable[None]]

PREDICTION = {
    "prediction": "Hello",
    "adapter": "formal",
    "finish_reason": "length",
    "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
    "timings": {"queue_ms": 2.0, "first_token_ms": 20.0, "total_ms": 60.0},
}


class Route:
    """What Starlette's router leaves in the scope."""

    def __init__(self, path: str) -> None:
        self.path = path


def served_with(settings: HTTPSettings = HTTPSettings(), **fields: Any) -> Served:  # noqa: B008
    """A service that has not been started."""
    info = ServiceInfo("my_service", "my_project", model_tag="tiny:1.0.0")
    served = Served(RunnerHost(lambda: None), info, settings, **fields)  # type: ignore[arg-type]
    served.metrics = Metrics(served.info) if settings.enable_metrics else None
    return served


def scope_of(path: str = "/predict", headers: Mapping[str, str] | None = None) -> dict[str, Any]:
    raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    address = ("192.0.2.7", 1234)
    return {"type": "http", "method": "POST", "path": path, "headers": raw, "client": address}


def call(app: App, scope: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """What the app sends to a client that stays."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    asyncio.run(app(scope or scope_of(), receive, send))  # type: ignore[arg-type]
    return sent


def front(app: App, served: Served | None = None) -> Front:
    return Front(app, served or served_with())


async def start(send: Any, status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})


async def body(send: Any, *, more: bool = False) -> None:
    await send({"type": "http.response.body", "body": b"x", "more_body": more})
