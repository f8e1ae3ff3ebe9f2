"""Requests that are ended for the service's sake."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from echo_runner import EchoRunner
from text_runner import HELLO, LONG_S, ScriptedRunner

from mlops.errors import EngineShutdownError
from mlops.serving.http import RunnerHost
from mlops.serving.runner.base import TextChunk

ASK = {"text": "Hi"}


@pytest.fixture
def hosting() -> Iterator[Callable[[Any], RunnerHost]]:
    hosts: list[RunnerHost] = []

    def host(runner: Any) -> RunnerHost:
        made = RunnerHost(lambda: runner)
        hosts.append(made)
        made.start()
        give_up = time.monotonic() + LONG_S
        while made.status == "loading":
            assert time.monotonic() < give_up
            time.sleep(0.002)
        return made

    yield host
    for one in hosts:
        one.stop()


async def until(condition: Callable[[], Any]) -> None:
    give_up = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < give_up, "it never came"
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("ask", ["predict", "stream"])
def test_a_request_without_an_answer_yet(hosting: Callable[..., RunnerHost], ask: str) -> None:
    runner = ScriptedRunner(threading.Event())
    host = hosting(runner)

    async def run() -> None:
        asking = asyncio.create_task(getattr(host, ask)(ASK))
        await until(lambda: runner.generatings)
        host.end_requests()
        with pytest.raises(EngineShutdownError, match="shutting down"):
            await asking
        with pytest.raises(EngineShutdownError, match="shutting down"):
            await getattr(host, ask)(ASK)

    asyncio.run(run())
    assert runner.generatings[0].cancelled.is_set()
    assert len(runner.generatings) == 1


def test_a_request_that_waits_for_a_batch(hosting: Callable[..., RunnerHost]) -> None:
    entered, goes_on = threading.Event(), threading.Event()

    class Slow(EchoRunner):
        def predict_batch(self, inputs: Any, **options: Any) -> Any:
            entered.set()
            assert goes_on.wait(LONG_S)
            return super().predict_batch(inputs, **options)

    host = hosting(Slow())

    async def run() -> None:
        asking = [asyncio.create_task(host.predict(ASK)) for _ in range(2)]
        await until(entered.is_set)
        host.end_requests()
        for one in asking:
            with pytest.raises(EngineShutdownError, match="shutting down"):
                await one
        goes_on.set()

    asyncio.run(run())


def test_a_stream_says_why_it_ends(hosting: Callable[..., RunnerHost]) -> None:
    begun = HELLO[0]
    for last in (TextChunk(0, "", (), "cancelled"), None):  # with both ways of being cancelled
        runner = ScriptedRunner(begun, threading.Event(), *([last] if last else []))
        host = hosting(runner)

        async def run(host: RunnerHost = host) -> list[TextChunk]:
            stream = await host.stream(ASK)
            seen = []
            with pytest.raises(EngineShutdownError, match="shutting down"):
                async for chunk in stream.chunks():
                    seen.append(chunk)
                    host.end_requests()
            stream.cancel()
            return seen

        assert asyncio.run(run()) == [begun]
        assert runner.generatings[0].cancelled.is_set()


def test_a_stream_that_has_ended_is_not_called_cut_off(hosting: Callable[..., RunnerHost]) -> None:
    host = hosting(ScriptedRunner())

    async def read(chunks: AsyncIterator[TextChunk]) -> list[TextChunk]:
        seen = []
        async for chunk in chunks:
            seen.append(chunk)
            if chunk.finish_reason:
                host.end_requests()
        return seen

    async def run() -> list[TextChunk]:
        stream = await host.stream(ASK)
        try:
            return await read(stream.chunks())
        finally:
            stream.cancel()

    assert asyncio.run(run()) == list(HELLO)


def test_nothing_is_kept_of_requests_that_are_over(hosting: Callable[..., RunnerHost]) -> None:
    host = hosting(ScriptedRunner())

    async def run() -> None:
        await host.predict(ASK)
        stream = await host.stream(ASK)
        stream.cancel()
        stream.cancel()

    asyncio.run(run())
    assert host._under_way._ends == set()


def test_a_service_that_starts_again_answers_again(hosting: Callable[..., RunnerHost]) -> None:
    host = hosting(ScriptedRunner())
    host.is_draining = True
    host.end_requests()
    host.stop()
    host.start()
    answer = asyncio.run(host.predict(ASK))
    assert answer["prediction"] == "Hello"
    assert not host.is_draining
