"""A request that another replica has sent on, as the replica that answers it sees it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray_handles import START, Message, body

from mlops.serving.http import RunnerHost, Served, ServiceInfo, create_app
from mlops.serving.http.paths import handed_over
from mlops.serving.ray.handover import MAX_MESSAGES, answer
from mlops.serving.runner.base import TextChunk

SCOPE = {"type": "http", "path": "/predict"}
App = Callable[[Any, Any, Any], Coroutine[Any, Any, None]]


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Run it; nothing of it goes on afterwards, and nothing takes for ever."""

    async def watched() -> None:
        async with asyncio.timeout(30):
            await scenario
        for _ in range(3):  # what was cancelled needs its turn to end
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(watched())


def answering(app: App, content: bytes = b"{}") -> AsyncGenerator[list[Message], None]:
    return answer(app, SCOPE, content)  # type: ignore[return-value, arg-type]


async def spin() -> None:
    """Let others do what they can do without waiting for anybody."""
    for _ in range(50):
        await asyncio.sleep(0)


def test_the_app_gets_the_request_and_its_answer_comes_back() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked.append((scope, await receive()))
        await send(START)
        await send(body("Hello", more=False))

    asked: list[Any] = []

    async def scenario() -> None:
        assert [one async for one in answering(app, b'{"text": "a"}')] == [
            [START, body("Hello", more=False)]
        ]

    run(scenario())
    message = {"type": "http.request", "body": b'{"text": "a"}', "more_body": False}
    assert asked == [(SCOPE, message)]


@given(st.lists(st.booleans(), max_size=60))
def test_no_message_is_lost_or_out_of_order(pauses: list[bool]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for number, pauses_here in enumerate(pauses):
            await send(body(str(number)))
            if pauses_here:
                await asyncio.sleep(0)

    async def scenario() -> None:
        several = [one async for one in answering(app)]
        assert all(several)
        texts = [message["body"].decode() for messages in several for message in messages]
        assert texts == [str(number) for number in range(len(pauses))]

    run(scenario())


def test_messages_come_while_the_app_goes_on() -> None:
    async def scenario() -> None:
        gate = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send(START)
            await send(body("1"))
            await gate.wait()
            for number in range(2, 6):
                await send(body(str(number)))

        messages = answering(app)
        assert await anext(messages) == [START, body("1")]
        gate.set()
        await spin()
        assert await anext(messages) == [body(str(number)) for number in range(2, 6)]
        assert await anext(messages, None) is None

    run(scenario())


def test_an_app_that_says_nothing_says_nothing() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        pass

    async def scenario() -> None:
        assert [one async for one in answering(app)] == []

    run(scenario())


@pytest.mark.parametrize("num_sent", [0, 1, 40])
def test_the_apps_error_comes_after_what_it_said(num_sent: int) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for number in range(num_sent):
            await send(body(str(number)))
        raise KeyError("inside")

    async def scenario() -> None:
        texts = []
        with pytest.raises(KeyError, match="inside"):
            async for messages in answering(app):
                texts += [message["body"].decode() for message in messages]
        assert texts == [str(number) for number in range(num_sent)]

    run(scenario())


def test_a_slow_reader_holds_the_app_up() -> None:
    num_sent = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal num_sent
        for number in range(100):
            await send(body(str(number)))
            num_sent += 1

    async def scenario() -> None:
        messages = answering(app)
        first = await anext(messages)
        await spin()
        assert num_sent <= len(first) + MAX_MESSAGES
        rest = [message async for several in messages for message in several]
        assert num_sent == 100
        assert [*first, *rest] == [body(str(number)) for number in range(100)]

    run(scenario())


def test_the_app_is_told_when_its_client_leaves() -> None:
    received = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(START)
        received.append(await receive())

    async def scenario() -> None:
        messages = answering(app)
        await anext(messages)
        await spin()
        await messages.aclose()

    run(scenario())
    assert received == [{"type": "http.disconnect"}]


@pytest.mark.parametrize("num_sent", [1, 100])
def test_an_app_that_does_not_listen_ends_too(num_sent: int) -> None:
    ended = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            for number in range(num_sent):
                await send(body(str(number)))
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def scenario() -> None:
        messages = answering(app)
        await anext(messages)
        await spin()
        await messages.aclose()
        assert ended

    run(scenario())


def test_a_reader_that_is_cancelled_leaves_nothing_behind() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    async def scenario() -> None:
        async def read() -> None:
            async with contextlib.aclosing(answering(app)) as messages:
                await anext(messages)

        reading = asyncio.create_task(read())
        await spin()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    run(scenario())


class Generating:
    """A text that begins, and goes on until somebody cancels it."""

    def __init__(self, runner: Endless) -> None:
        self.runner = runner

    def cancel(self) -> None:
        self.runner.cancelled.set()

    async def begun(self) -> None:
        pass

    async def chunks(self) -> Any:
        yield TextChunk(0, "Hel", (1,))
        await self._end()
        yield TextChunk(0, "", (), "cancelled")

    async def prediction(self) -> dict[str, Any]:
        await self._end()
        return {"prediction": "", "finish_reason": "cancelled", "mlx_optimized": True}

    async def _end(self) -> None:
        self.runner.begun.set()
        while not self.runner.cancelled.is_set():
            await asyncio.sleep(0.001)


class Endless:
    """A text runner of such texts."""

    can_generate = True
    is_loaded = True

    def __init__(self) -> None:
        self.begun, self.cancelled = threading.Event(), threading.Event()

    def generate(self, _: Any, *, deadline_s: float | None = None) -> Generating:
        return Generating(self)

    def statistics(self) -> dict[str, Any]:
        return {}

    def token_bytes(self, tokens: Any, adapter: Any = None) -> list[bytes]:
        return []

    def load_model(self) -> None: ...

    def unload_model(self) -> None: ...

    def predict(self, _: Any) -> Any: ...

    def predict_batch(self, _: Any) -> Any: ...

    def get_memory_usage(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_counted_as_gone(stream: bool) -> None:
    """And not as a failure of the service, whose rate an operator is woken by."""
    runner = Endless()
    host = RunnerHost(lambda: runner)
    served = Served(host, ServiceInfo("my_service"))
    app: Any = create_app(served)

    async def scenario() -> None:
        scope = handed_over(
            {
                **{"type": "http", "method": "POST", "path": "/predict", "query_string": b""},
                **{"headers": [(b"content-type", b"application/json")]},
            }
        )

        async def read() -> None:
            content = json.dumps({"text": "a", "stream": stream}).encode()
            async with contextlib.aclosing(answer(app, scope, content)) as messages:  # type: ignore[type-var]
                async for _ in messages:
                    pass

        reading = asyncio.create_task(read())
        while not runner.begun.is_set():
            await asyncio.sleep(0.001)
        reading.cancel()
        await asyncio.wait([reading])

    host.start()
    try:
        run(scenario())
    finally:
        host.stop()
    assert runner.cancelled.is_set()
    assert served.requests_by_status == {499: 1}
