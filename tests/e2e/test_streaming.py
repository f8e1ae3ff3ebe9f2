"""The routes of a text runner under a real `bentoml serve`: events, clients that leave, many."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from serving_process import BENTOML, LONG_S, ServingProcess

SERVICE = """
import asyncio

from mlops.serving.bentoml.service import create_bentoml_service
from mlops.serving.runner.base import TextChunk


class Counting:
    def __init__(self, runner, num_tokens):
        self.runner, self.num_tokens, self.is_over = runner, num_tokens, False
        runner.running += 1

    def cancel(self):
        if not self.is_over:
            self.is_over = True
            self.runner.running -= 1

    async def begun(self):
        pass

    async def chunks(self):
        for number in range(self.num_tokens):
            await asyncio.sleep(0)
            is_last = number == self.num_tokens - 1
            yield TextChunk(0, f" {number}", (number,), "length" if is_last else None)

    async def prediction(self):
        text = "".join(f" {number}" for number in range(self.num_tokens))
        usage = {"prompt_tokens": 1, "completion_tokens": self.num_tokens,
                 "total_tokens": 1 + self.num_tokens}
        return {"prediction": text, "finish_reason": "length", "usage": usage}


class CountingRunner:
    can_generate = True

    def __init__(self, model_path):
        self.is_loaded = False
        self.running = 0

    def load_model(self):
        self.is_loaded = True

    def generate(self, input_data, *, deadline_s=None):
        return Counting(self, input_data["max_tokens"])

    def token_bytes(self, token_ids, adapter=None):
        return [b"" for _ in token_ids]

    def statistics(self):
        return {"running": self.running, "waiting": 0, "batch_sizes": {}}

    def predict(self, input_data):
        return {}

    def predict_batch(self, inputs):
        return [{} for _ in inputs]

    def get_memory_usage(self):
        return {"total_mb": 1.0}

    def unload_model(self):
        self.is_loaded = False


svc = create_bentoml_service("model", "counting", runner_class=CountingRunner)
"""
NUM_CLIENTS = 256
ENDLESS = 10**9


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServingProcess]:
    folder = tmp_path_factory.mktemp("project")
    (folder / "service.py").write_text(SERVICE)
    (folder / "model").mkdir()
    command = [*BENTOML, "serve", "service:svc"]
    with ServingProcess(command, folder, folder / "home") as server:
        yield server.wait_until_ready()


def running(server: ServingProcess) -> int:
    metrics = httpx.get(f"{server.url}/metrics", timeout=LONG_S, trust_env=False).json()
    number: int = metrics["requests_running"]
    return number


def wait_for(condition: Callable[[], Any]) -> None:
    give_up = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < give_up, "it never came"
        time.sleep(0.02)


def request(**fields: Any) -> bytes:
    """The bytes of one request on a connection of its own."""
    body = json.dumps({"model": "counting", "prompt": "count", **fields}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_is_lost_when_many_come_at_once(server: ServingProcess, stream: bool) -> None:
    async def ask() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        with contextlib.closing(writer):
            writer.write(request(max_tokens=5, stream=stream))
            return await reader.read()

    async def ask_all() -> list[bytes]:
        return await asyncio.gather(*(ask() for _ in range(NUM_CLIENTS)))

    answers = asyncio.run(ask_all())
    assert len(answers) == NUM_CLIENTS
    for answer in answers:
        assert answer.startswith(b"HTTP/1.1 200")
        if stream:
            assert answer.count(b"data: {") == 5
            assert b"data: [DONE]\n\n" in answer
        else:
            assert b'" 0 1 2 3 4"' in answer
    wait_for(lambda: running(server) == 0)


@pytest.mark.parametrize("reads", [True, False])
def test_a_client_that_leaves_ends_its_generation(server: ServingProcess, reads: bool) -> None:
    async def ask_and_leave() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=2**10)
        writer.write(request(max_tokens=ENDLESS, stream=True))
        await reader.readuntil(b'" 0"')
        assert await asyncio.to_thread(running, server) == 1  # answered beside an endless stream
        if reads:
            for _ in range(100):
                await reader.readuntil(b"\n\n")
        writer.transport.abort()

    asyncio.run(ask_and_leave())
    wait_for(lambda: running(server) == 0)
