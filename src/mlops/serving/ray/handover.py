"""A request for an adapter that reached another replica than its own: it is answered over there.

    proxy -> any replica -> `Handover` -> Ray's handle -> the adapter's replica -> `answer`

Ray's proxies do not read bodies, so they cannot know the adapter. A replica that has read it, let
the client in and found that the adapter belongs elsewhere sends the request on, and passes the
answer back as it comes. Only the replica that answers counts and logs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError
from ray.serve.exceptions import RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlops.engine import BASE_NAME
from mlops.errors import DeadlineExceededError
from mlops.serving.http.models import adapter_of
from mlops.serving.http.paths import handed_over, route_path
from mlops.serving.http.records import record_of
from mlops.serving.http.served import Served
from mlops.serving.ray.affinity import Owners

ARRIVAL_S = 5.0
"""On top of a request's time, for its answer to come back."""

LEAVE_S = 1.0
"""For an app to end by itself once its client has left."""

MAX_MESSAGES = 16
"""Pieces of an answer that wait for a slow reader."""

_CANNOT_BE_HAD = (
    ActorDiedError,
    ActorUnavailableError,
    RayServeException,
    StopAsyncIteration,
)


class Handover:
    """Sends requests on; `Served.elsewhere` of a replica.

    Args:
        me: this replica's id.
        max_at_once: requests that may be on their way at a time. More are answered here, with their
            adapter: so a replica always has room to answer what others have sent, and two of them
            cannot wait for each other for ever.
    """

    def __init__(
        self, handle: DeploymentHandle, served: Served, owners: Owners, me: str, max_at_once: int
    ) -> None:
        self._handle = handle
        self._served = served
        self._owners = owners
        self._me = me
        self._max_at_once = max_at_once
        self._num_under_way = 0

    async def __call__(self, request: Request, body: Mapping[str, Any]) -> Response | None:
        """The answer of the adapter's replica; None when this is it, or it cannot be had."""
        adapter = self._adapter_of(request.scope, body)
        if adapter is None or self._owners.of(adapter) in {None, self._me}:
            return None
        if self._num_under_way >= self._max_at_once:
            return None
        self._num_under_way += 1
        answer = self._ask(adapter, request.scope, body)
        try:
            # Over there its time begins when it arrives; on the way it may wait for room.
            async with asyncio.timeout(self._served.host.timeout_s + ARRIVAL_S):
                first = await anext(answer)
        except BaseException as exc:
            self._end()
            await answer.aclose()
            if isinstance(exc, TimeoutError):
                raise DeadlineExceededError("no replica had room for the request") from exc
            is_cancelled = isinstance(exc, RequestCancelledError)
            if isinstance(exc, _CANNOT_BE_HAD) and not is_cancelled:
                return None  # nothing of an answer has come: it can be given here
            raise
        record_of(request.scope).is_elsewhere = True
        return _Relayed(first, answer, self._end)

    def _end(self) -> None:
        self._num_under_way -= 1

    def _adapter_of(self, scope: Scope, body: Mapping[str, Any]) -> str | None:
        """The adapter that a request names, when the service has it."""
        if route_path(scope) == "/predict":
            adapter = body.get("adapter")
        else:
            model = body.get("model")
            names = self._served.info.model_names
            adapter = adapter_of(model, names).get("adapter") if isinstance(model, str) else None
        known = isinstance(adapter, str) and adapter != BASE_NAME
        return adapter if known and adapter in self._owners.adapters else None

    async def _ask(
        self, adapter: str, scope: Scope, body: Mapping[str, Any]
    ) -> AsyncGenerator[list[Message]]:
        answer = self._handle.options(
            stream=True, method_name="answer", multiplexed_model_id=adapter
        ).remote(
            handed_over(scope),
            json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass"),
        )
        try:
            async for messages in answer:
                yield messages
        finally:
            answer.cancel()  # nothing happens to one that has ended


class _Relayed(Response):
    """An answer that comes from another replica."""

    def __init__(
        self, first: list[Message], rest: AsyncIterator[list[Message]], on_end: Any
    ) -> None:
        self._first = first
        self._rest = rest
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with contextlib.aclosing(self._rest):  # type: ignore[type-var]
                for message in self._first:
                    await send(message)
                async for messages in self._rest:
                    for message in messages:
                        await send(message)
        except RayActorError:
            record_of(scope).is_elsewhere = False  # nobody is left there to count it
            raise
        finally:
            self._on_end()


async def answer(app: ASGIApp, scope: Scope, body: bytes) -> AsyncIterator[list[Message]]:
    """Answer a request that another replica has sent on: the messages of ASGI, as they come.

    When nobody wants more of them, the app is told that its client has left.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue(MAX_MESSAGES)
    unread = [{"type": "http.request", "body": body, "more_body": False}]
    has_left = asyncio.Event()

    async def receive() -> Message:
        if unread:
            return unread.pop()
        await has_left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if not has_left.is_set():
            await messages.put(message)

    async def run() -> None:
        try:
            await app(scope, receive, send)
        finally:
            if not has_left.is_set():
                await messages.put(None)

    task = asyncio.create_task(run())
    try:
        is_over = False
        while not is_over:
            several = [await messages.get()]
            while not messages.empty():
                several.append(messages.get_nowait())
            is_over = several[-1] is None
            if told := [message for message in several if message is not None]:
                yield told
        await task
    finally:
        has_left.set()
        while not messages.empty():
            messages.get_nowait()  # a `send` that waits for room goes on
        try:
            await asyncio.wait({task}, timeout=LEAVE_S)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
