from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from echo_runner import EchoRunner
from starlette.requests import ClientDisconnect
from starlette.testclient import TestClient
from text_runner import HELLO, LONG_S, ScriptedRunner

from mlops.errors import (
    DeadlineExceededError,
    EngineShutdownError,
    QueueFullError,
    ServiceError,
)
from mlops.serving.http import RunnerHost, Served, ServiceInfo, create_app
from mlops.serving.runner.base import TextRunner

ASK = {"text": "Hi"}


def wait_for(condition: Callable[[], Any]) -> None:
    give_up = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < give_up, "it never came"
        time.sleep(0.002)


@pytest.fixture
def hosting() -> Iterator[Callable[..., RunnerHost]]:
    """Makes a host of a runner, started and loaded; stops them all afterwards."""
    hosts: list[RunnerHost] = []

    def host(make_runner: Any, *, wait: bool = True, **settings: Any) -> RunnerHost:
        made = RunnerHost(make_runner, **settings)
        hosts.append(made)
        made.start()
        if wait:
            wait_for(lambda: made.status != "loading")
        return made

    yield host
    for one in hosts:
        one.stop()


def test_a_text_runner_is_asked_without_a_batch(hosting: Callable[..., RunnerHost]) -> None:
    runner = ScriptedRunner()
    assert isinstance(runner, TextRunner)
    host = hosting(lambda: runner, timeout_s=50.0)
    answer = asyncio.run(host.predict(ASK))
    assert answer["prediction"] == "Hello"
    assert runner.asked == [ASK]
    assert runner.batches == []
    assert 0 < runner.time_left_s[0] <= 50.0


def test_a_text_runner_that_was_made_something_else_is_asked_in_batches(
    hosting: Callable[..., RunnerHost],
) -> None:
    class Custom(ScriptedRunner):
        can_generate = False

    runner = Custom()
    assert asyncio.run(hosting(lambda: runner).predict(ASK))["prediction"] == "Hi"
    assert (runner.asked, runner.batches) == ([], [[ASK]])


@pytest.mark.parametrize("ask", ["predict", "stream"])
def test_a_request_that_takes_too_long_is_cancelled(
    hosting: Callable[..., RunnerHost], ask: str
) -> None:
    runner = ScriptedRunner(threading.Event())
    host = hosting(lambda: runner, timeout_s=0.05)
    with pytest.raises(DeadlineExceededError, match=r"within 0.05 s"):
        asyncio.run(getattr(host, ask)(ASK))
    assert runner.generatings[0].cancelled.is_set()


@pytest.mark.parametrize("ask", ["predict", "stream"])
def test_a_client_that_leaves_is_cancelled(hosting: Callable[..., RunnerHost], ask: str) -> None:
    runner = ScriptedRunner(threading.Event())
    host = hosting(lambda: runner)

    async def leave() -> None:
        while not runner.generatings:
            await asyncio.sleep(0.001)

    with pytest.raises(ClientDisconnect):
        asyncio.run(getattr(host, ask)(ASK, leave))
    assert runner.generatings[0].cancelled.is_set()


@pytest.mark.parametrize("load_error", [None, ServiceError("damaged")])
def test_requests_wait_for_the_model_up_to_a_number(
    hosting: Callable[..., RunnerHost], load_error: Exception | None
) -> None:
    gate = threading.Event()
    runner = ScriptedRunner()
    runner.load_error = load_error

    def make_runner() -> ScriptedRunner:
        gate.wait(LONG_S)
        return runner

    host = hosting(make_runner, wait=False, max_waiting=3)

    async def ask() -> list[Any]:
        waiting = [asyncio.ensure_future(host.predict(ASK)) for _ in range(3)]
        while host.num_waiting < 3:
            await asyncio.sleep(0.001)
        with pytest.raises(QueueFullError):
            await host.predict(ASK)
        waiting.pop().cancel()  # its place is free again
        while host.num_waiting == 3:
            await asyncio.sleep(0.001)
        waiting.append(asyncio.ensure_future(host.predict(ASK)))
        while host.num_waiting < 3:
            await asyncio.sleep(0.001)
        gate.set()
        return await asyncio.gather(*waiting, return_exceptions=True)

    answers = asyncio.run(ask())
    assert host.num_waiting == 0
    if load_error:
        assert all(isinstance(answer, EngineShutdownError) for answer in answers)
    else:
        assert [answer["prediction"] for answer in answers] == ["Hello"] * 3


def test_waiting_for_the_model_is_part_of_a_requests_time(
    hosting: Callable[..., RunnerHost],
) -> None:
    gate = threading.Event()

    def make_runner() -> ScriptedRunner:
        gate.wait(LONG_S)
        return ScriptedRunner()

    host = hosting(make_runner, wait=False, timeout_s=0.3)
    with pytest.raises(DeadlineExceededError):
        asyncio.run(host.predict(ASK))
    gate.set()
    wait_for(lambda: host.status == "healthy")
    assert asyncio.run(host.predict(ASK))["prediction"] == "Hello"


def test_stopping_refuses_those_that_wait_and_those_that_come(
    hosting: Callable[..., RunnerHost],
) -> None:
    gate = threading.Event()
    runner = ScriptedRunner()

    def make_runner() -> ScriptedRunner:
        gate.wait(LONG_S)
        return runner

    host = hosting(make_runner, wait=False)

    async def ask() -> None:
        waiting = asyncio.ensure_future(host.predict(ASK))
        while not host.num_waiting:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(host.stop)
        with pytest.raises(EngineShutdownError):
            await waiting
        with pytest.raises(EngineShutdownError):
            await host.predict(ASK)

    asyncio.run(ask())
    gate.set()
    assert runner.asked == []


def test_a_stream_begins_with_its_first_text(hosting: Callable[..., RunnerHost]) -> None:
    never = threading.Event()
    runner = ScriptedRunner(HELLO[0], never, HELLO[1])
    host = hosting(lambda: runner)

    async def ask() -> list[str]:
        stream = await host.stream(ASK)
        never.set()
        return [chunk.text async for chunk in stream.chunks()]

    assert asyncio.run(ask()) == ["Hel", "lo"]


def test_metrics_of_a_text_runner(hosting: Callable[..., RunnerHost]) -> None:
    host = hosting(ScriptedRunner)
    client = TestClient(create_app(Served(host, ServiceInfo("s"))))
    client.post("/predict", json=ASK)
    body = client.get("/metrics").json()
    assert (body["requests_running"], body["requests_waiting"]) == (2, 1)
    assert list(body["batches_by_size"].items()) == [("2", 3), ("10", 5)]
    assert body["engine"]["steps"] == 8
    assert body["requests_by_status"] == {"200": 1}


def test_a_text_runner_without_its_methods_is_told(hosting: Callable[..., RunnerHost]) -> None:
    class HalfATextRunner(EchoRunner):
        can_generate = True

    failure = hosting(HalfATextRunner).failure
    assert isinstance(failure, ServiceError)
    assert "HalfATextRunner.can_generate is true" in str(failure)
