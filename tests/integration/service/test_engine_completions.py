"""`/v1/completions` over the engine itself, with a tiny model and an adapter."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from mlops.serving.http import RunnerHost, Served, ServiceInfo, create_app
from mlops.serving.runner import MLXModelRunner
from tiny_models import write_language_model, write_lora_adapter

LONG_S = 60.0
ASK = {"prompt": "Hello", "max_tokens": 8, "temperature": 0.7, "seed": 3}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunnerHost]:
    folder = tmp_path_factory.mktemp("models")
    base = write_language_model(folder / "base")
    formal = write_lora_adapter(folder / "formal", base, scale=40.0, base_reference=str(base))
    host = RunnerHost(lambda: MLXModelRunner(base, adapters={"formal": formal}))
    host.start()
    give_up = time.monotonic() + LONG_S
    while host.status == "loading":
        assert time.monotonic() < give_up
        time.sleep(0.01)
    assert host.failure is None
    yield host
    host.stop()


@pytest.fixture
def client(host: RunnerHost) -> TestClient:
    return TestClient(create_app(Served(host, ServiceInfo("tiny"))), raise_server_exceptions=False)


def texts(client: TestClient, **fields: Any) -> list[str]:
    body = client.post("/v1/completions", json={**ASK, **fields}).json()
    return [choice["text"] for choice in body["choices"]]


def streamed_texts(client: TestClient, **fields: Any) -> list[str]:
    response = client.post("/v1/completions", json={**ASK, **fields, "stream": True})
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    pieces: dict[int, str] = {}
    for event in events:
        (choice,) = json.loads(event.removeprefix("data: "))["choices"]
        pieces[choice["index"]] = pieces.get(choice["index"], "") + choice["text"]
    return [pieces[index] for index in sorted(pieces)]


@pytest.mark.parametrize("model", ["tiny", "formal"])
@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_says_what_the_whole_answer_says(client: TestClient, model: str, n: int) -> None:
    whole = texts(client, model=model, n=n)
    assert len(whole) == n
    assert streamed_texts(client, model=model, n=n) == whole


def test_model_names_the_adapter(client: TestClient) -> None:
    answers = {
        model: texts(client, model=model, temperature=0)[0]
        for model in ("tiny", "base", "formal", "base:formal", "tiny:formal")
    }
    assert answers["tiny"] == answers["base"] != answers["formal"]
    assert answers["formal"] == answers["base:formal"] == answers["tiny:formal"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "nobody"}, 404, "model"),
        ({"top_p": 0}, 400, "top_p"),
        ({"prompt": [10**9]}, 400, "prompt"),
        ({"prompt": ["a", [10**9]]}, 400, "prompt"),
        ({"prompt": [[1], [10**9]]}, 400, "prompt"),
        ({"max_tokens": 10**9}, 400, "max_tokens"),
        ({"logit_bias": {"a": 1}}, 400, "logit_bias"),
    ],
)
def test_what_the_engine_refuses_has_its_status_in_a_stream_too(
    client: TestClient, fields: dict[str, Any], status: int, param: str, stream: bool
) -> None:
    body = {"model": "tiny", **ASK, **fields, "stream": stream}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param


def test_a_client_that_leaves_frees_its_row(client: TestClient, host: RunnerHost) -> None:
    body = json.dumps({"model": "tiny", **ASK, "max_tokens": 200, "n": 2, "stream": True})
    messages = [{"type": "http.request", "body": body.encode(), "more_body": False}]

    async def leave_after_the_first_text() -> int:
        begun = asyncio.Event()
        num_texts = 0

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await begun.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            nonlocal num_texts
            if message["type"] == "http.response.body":
                num_texts += 1
                begun.set()
                await asyncio.Event().wait()  # it never reads

        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "headers": headers,
        }
        await client.app(scope, receive, send)  # type: ignore[arg-type]
        return num_texts

    runner = host.text_runner
    assert runner is not None
    before = runner.statistics()["requests"]["finished"]
    assert asyncio.run(leave_after_the_first_text()) == 1
    give_up = time.monotonic() + LONG_S
    while runner.statistics()["running"]:
        assert time.monotonic() < give_up
        time.sleep(0.005)
    finished = runner.statistics()["requests"]["finished"]
    assert finished["cancelled"] - before["cancelled"] == 2
