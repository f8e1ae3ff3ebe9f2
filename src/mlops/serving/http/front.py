"""In front of every route: a request's id and its record, which log, metrics and spans are made of.

    http.request -> id and record -> the route -> last byte: counters, log line, span

A request is over when the last of its answer is handed to the server, when the route fails, or when
the route returns without having ended its answer: that is how a stream ends whose client has left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlops.serving.http.errors import CLIENT_LEFT, STATUS
from mlops.serving.http.paths import route_path
from mlops.serving.http.records import RequestRecord
from mlops.serving.http.request_log import RequestLog
from mlops.serving.http.served import Served
from mlops.serving.http.tracing import Span, tracing_of

logger = logging.getLogger(__name__)

REFRESH_S = 1.0
"""How old the gauges of one worker may be when another one is scraped."""

_HEADER = b"x-request-id"
_SANE_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_STATUS_BY_NAME = {kind.__name__: status for kind, status in STATUS.items()}


class Front:
    """ASGI middleware; see the module."""

    def __init__(self, app: ASGIApp, served: Served) -> None:
        self._app = app
        self._served = served
        settings = served.settings
        self._log = RequestLog() if settings.log_requests else None
        self._tracing = tracing_of(served.tracer_provider, served.info)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._answer(scope, receive, send)
        elif scope["type"] == "lifespan":
            async with self._working():
                await self._app(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = RequestRecord(_request_id(scope), method=scope["method"])
        record.put_into(scope)
        span = self._tracing.begin(scope, record) if self._tracing else None
        header = (_HEADER, record.request_id.encode("ascii"))
        is_over = False

        async def send_and_note(message: Message) -> None:
            nonlocal is_over
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), header]}
            elif not is_over and not message.get("more_body", False):
                # Before the client can know: who asks for the metrics next finds itself counted.
                is_over = True
                self._end(scope, record, span)
            await send(message)

        try:
            with span.as_parent() if span else contextlib.nullcontext():
                await self._app(scope, receive, send_and_note)
        except ClientDisconnect:
            raise
        except asyncio.CancelledError:
            record.error = None if self._served.cancelling_is_leaving else "CancelledError"
            raise
        except BaseException as exc:  # in the middle of an answer, or the server gives it up
            record.error = type(exc).__name__
            raise
        finally:
            if not is_over:
                record.status = record.status if record.error else CLIENT_LEFT
                self._end(scope, record, span)

    def _end(self, scope: Scope, record: RequestRecord, span: Span | None) -> None:
        record.duration_s = time.monotonic() - record.started_s
        record.route = getattr(scope.get("route"), "path", record.route)
        if record.route == "other" and (path := route_path(scope)) in self._served.paths:
            record.route = path  # refused before it was routed
        if not record.client and (address := scope.get("client")):
            record.client = address[0]
        if record.error and record.status < 400:
            record.status = _STATUS_BY_NAME.get(record.error, 500)
        served = self._served
        if record.is_elsewhere:
            if span:
                span.end(record)
            return
        served.requests_by_status[record.status] += 1
        if served.metrics:
            served.metrics.on_request(record)
        if span:
            span.end(record)
        if self._log:
            self._log.add(record, scope["path"])

    @contextlib.asynccontextmanager
    async def _working(self) -> AsyncIterator[None]:
        """What goes on beside the requests, as long as the app runs."""
        async with contextlib.AsyncExitStack() as stack:
            watching = asyncio.create_task(self._served.host.watch())
            stack.callback(watching.cancel)
            if self._log:
                await stack.enter_async_context(self._log.writing())
            if self._served.metrics:
                refreshing = asyncio.create_task(self._refresh())
                stack.callback(refreshing.cancel)
            yield

    async def _refresh(self) -> None:
        has_failed = False
        while self._served.metrics:
            try:
                self._served.metrics.refresh(self._served.host)
                has_failed = False
            except Exception:  # a runner's own code: the next time it may work
                if not has_failed:
                    logger.exception("the metrics could not be refreshed")
                has_failed = True
            await asyncio.sleep(REFRESH_S)


def _request_id(scope: Scope) -> str:
    """The client's, where it is short and visible; else one of ours."""
    for name, value in scope["headers"]:
        if name == _HEADER:
            if _SANE_ID.fullmatch(value):
                return str(value, "ascii")
            break
    return os.urandom(16).hex()  # what a random UUID is, at a quarter of its cost
