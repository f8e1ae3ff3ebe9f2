"""What a host says and does when what it has loaded dies or hangs."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from echo_runner import EchoRunner
from starlette.testclient import TestClient
from text_runner import HELLO, LONG_S, ScriptedRunner

from mlops.errors import EngineShutdownError
from mlops.serving.http import RunnerHost, Served, ServiceInfo, Status, create_app
from mlops.serving.http import host as host_module
from mlops.serving.runner.base import TextChunk

ASK = {"text": "Hi"}


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "CHECK_EVERY_S", 0.005)


class Mortal(ScriptedRunner):
    """A runner that says when it will never answer again, or stands still."""

    fatal_error: str | None = None
    running = 0

    def statistics(self) -> dict[str, Any]:
        return {"running": self.running}


@pytest.fixture
def hosting() -> Iterator[Callable[..., RunnerHost]]:
    hosts: list[RunnerHost] = []

    def host(runner: Any, **settings: Any) -> RunnerHost:
        made = RunnerHost(lambda: runner, **settings)
        hosts.append(made)
        made.start()
        wait_for(lambda: made.status is not Status.LOADING)
        return made

    yield host
    for one in hosts:
        one.stop()


def wait_for(condition: Callable[[], Any]) -> None:
    give_up = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < give_up, "it never came"
        time.sleep(0.002)


def die(runner: Mortal) -> None:
    runner.fatal_error = "its thread is gone"


def hang(runner: Mortal) -> None:
    runner.running = 1


@pytest.mark.parametrize(
    ("fault", "reason"), [(die, "its thread is gone"), (hang, "has made no step for 0 s")]
)
def test_probes_and_health_say_so_at_once(
    hosting: Callable[..., RunnerHost], fault: Callable[[Mortal], None], reason: str
) -> None:
    runner = Mortal()
    host = hosting(runner, stuck_after_s=0.05)
    client = TestClient(create_app(Served(host, ServiceInfo("tiny"))))  # nobody watches
    assert [client.get(path).status_code for path in ("/livez", "/readyz", "/health")] == [200] * 3
    fault(runner)
    client.get("/livez")
    if fault is hang:
        time.sleep(0.06)
    assert [client.get(path).status_code for path in ("/livez", "/readyz", "/health")] == [503] * 3
    health = client.get("/health").json()
    assert (health["status"], health["model_loaded"]) == ("unhealthy", False)
    assert reason in health["error"]["message"]
    refused = client.post("/predict", json=ASK)
    assert refused.status_code == 503
    assert "started again" in refused.json()["error"]["message"]
    runner.fatal_error, runner.running = None, 0
    assert client.get("/readyz").status_code == 503  # only a restart helps


def test_whoever_waits_is_told_and_the_server_too(hosting: Callable[..., RunnerHost]) -> None:
    never = threading.Event()
    runner = Mortal(HELLO[0], never)
    host = hosting(runner)
    told: list[bool] = []
    host.on_broken = lambda: told.append(True)

    async def read(chunks: AsyncIterator[TextChunk]) -> None:
        async for _ in chunks:
            pass

    async def run() -> None:
        watching = asyncio.create_task(host.watch())
        stream = await host.stream(ASK)
        asking = [
            asyncio.create_task(host.predict(ASK)),
            asyncio.create_task(read(stream.chunks())),
        ]
        await asyncio.sleep(0.02)
        die(runner)
        for one in asking:
            with pytest.raises(EngineShutdownError, match="started again"):
                await one
        stream.cancel()
        await watching

    try:
        asyncio.run(run())
    finally:
        never.set()
    assert told == [True]


def test_a_model_that_does_not_unload_is_left(hosting: Callable[..., RunnerHost]) -> None:
    goes_on = threading.Event()

    class Slow(EchoRunner):
        def unload_model(self) -> None:
            assert goes_on.wait(LONG_S)

    host = hosting(Slow())
    host.stop(0.01)
    goes_on.set()
    assert host.is_broken
    assert "did not unload within 0.01 s" in str(host.failure)


def test_what_unloading_raises_is_raised(hosting: Callable[..., RunnerHost]) -> None:
    class Failing(EchoRunner):
        def unload_model(self) -> None:
            raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        hosting(Failing()).stop(LONG_S)


def test_batches_that_nobody_makes_any_more(hosting: Callable[..., RunnerHost]) -> None:
    def limit() -> int:
        raise SystemExit("planted")

    host = hosting(EchoRunner(), max_batch_size=limit)

    async def run() -> None:
        with pytest.raises(EngineShutdownError, match="thread that answers batches has died"):
            await host.predict(ASK)

    asyncio.run(run())
    host.check()
    assert host.is_broken
