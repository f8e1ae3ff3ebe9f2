from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import pytest
from echo_runner import EchoRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from text_runner import LONG_S, ScriptedRunner

from mlops.errors import (
    AdapterNotFoundError,
    DeadlineExceededError,
    EngineShutdownError,
    InvalidRequestError,
    QueueFullError,
)
from mlops.serving.http import HTTPSettings, RunnerHost, Served, ServiceInfo, create_app
from mlops.serving.http.completions import RUNNER_FIELDS, parse_completion
from mlops.serving.http.sse import GRACE_S, EventStream
from mlops.serving.runner.base import TextChunk

INFO = ServiceInfo("my_service", model="models/my_model", model_tag="my_model:1.0.0")
ASK = {"model": "my_service", "prompt": "Hi"}
STREAM = {**ASK, "stream": True}
USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "total_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 2},
}
Serve = Callable[..., TestClient]


def wait_for(condition: Callable[[], Any]) -> None:
    give_up = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < give_up, "it never came"
        time.sleep(0.002)


@pytest.fixture
def serving() -> Iterator[Serve]:
    hosts: list[RunnerHost] = []

    def serve(
        runner: EchoRunner, settings: HTTPSettings = HTTPSettings(), **limits: Any
    ) -> TestClient:
        host = RunnerHost(lambda: runner, **limits)
        hosts.append(host)
        host.start()
        wait_for(lambda: host.status != "loading")
        return TestClient(create_app(Served(host, INFO, settings)), raise_server_exceptions=False)

    yield serve
    for host in hosts:
        host.stop()


def events_of(text: str) -> list[Any]:
    """The events of a stream; each is one line of data and an empty one."""
    lines = text.split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    data = [line.removeprefix("data: ") for line in lines]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


def test_a_completion(serving: Serve) -> None:
    runner = ScriptedRunner()
    response = serving(runner).post("/v1/completions", json=ASK)
    assert response.status_code == 200
    body = response.json()
    assert body.pop("id").startswith("cmpl-")
    assert abs(body.pop("created") - time.time()) < LONG_S
    assert body == {
        "object": "text_completion",
        "model": "my_service",
        "choices": [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "length"}],
        "usage": USAGE,
    }
    assert runner.asked == [{"prompt": "Hi", "max_tokens": 16, "temperature": 1.0}]


def test_several_choices(serving: Serve) -> None:
    runner = ScriptedRunner(
        TextChunk(1, "b", (1,), "stop"), TextChunk(0, "a", (2,)), TextChunk(0, "", (), "length")
    )
    client = serving(runner)
    choices = client.post("/v1/completions", json={**ASK, "n": 2}).json()["choices"]
    assert [(c["index"], c["text"], c["finish_reason"]) for c in choices] == [
        (0, "a", "length"),
        (1, "b", "stop"),
    ]
    events = events_of(client.post("/v1/completions", json={**STREAM, "n": 2}).text)
    choices = [event["choices"][0] for event in events[:-1]]
    assert [(c["index"], c["text"], c["finish_reason"]) for c in choices] == [
        (1, "b", "stop"),
        (0, "a", None),
        (0, "", "length"),
    ]


def test_a_stream(serving: Serve) -> None:
    text = 'Grüße\n\ndata: "quoted" \u2028 🙂 \\'
    runner = ScriptedRunner(TextChunk(0, text, (1,)), TextChunk(0, "", (), "stop"))
    response = serving(runner).post("/v1/completions", json=STREAM)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in response.headers
    *events, done = events_of(response.text)
    assert done == "[DONE]"
    assert [event["choices"] for event in events] == [
        [{"index": 0, "text": text, "logprobs": None, "finish_reason": None}],
        [{"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}],
    ]
    assert len({(event["id"], event["created"]) for event in events}) == 1
    assert all(event["object"] == "text_completion" for event in events)
    assert all(event["model"] == "my_service" for event in events)
    assert not any("usage" in event for event in events)
    assert runner.generatings[0].cancelled.is_set()  # told in any case: it costs nothing


def test_a_stream_with_usage(serving: Serve) -> None:
    body = {**STREAM, "stream_options": {"include_usage": True}}
    *events, usage, _ = events_of(serving(ScriptedRunner()).post("/v1/completions", json=body).text)
    assert [event["usage"] for event in events] == [None, None]
    assert usage["choices"] == []
    assert usage["usage"] == USAGE


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (DeadlineExceededError("its time is over"), "its time is over"),
        (RuntimeError("secret path /srv/weights"), "its log says why"),
    ],
)
def test_an_error_in_mid_stream_ends_it(serving: Serve, error: Exception, shown: str) -> None:
    client = serving(ScriptedRunner(TextChunk(0, "a", (1,)), error))
    response = client.post("/v1/completions", json=STREAM)
    assert response.status_code == 200
    first, last = events_of(response.text)
    assert first["choices"][0]["text"] == "a"
    assert set(last) == {"error"}
    assert last["error"]["type"] == "server_error"
    assert shown in last["error"]["message"]
    assert "secret" not in response.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (
            InvalidRequestError("top_p must be a number above 0", "top_p"),
            400,
            {"type": "invalid_request_error", "param": "top_p", "code": None},
        ),
        (
            AdapterNotFoundError("there is no adapter 'x'"),
            404,
            {"type": "invalid_request_error", "param": "model", "code": "model_not_found"},
        ),
        (
            QueueFullError("too many", retry_after_s=2.5),
            429,
            {"type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded"},
        ),
        (EngineShutdownError("stopping"), 503, {"type": "server_error"}),
        (DeadlineExceededError("late"), 504, {"type": "server_error"}),
        (RuntimeError("secret"), 500, {"type": "server_error"}),
    ],
)
def test_what_fails_before_the_first_text_has_its_status(
    serving: Serve, error: Exception, status: int, shown: Any, stream: bool
) -> None:
    for runner in (ScriptedRunner(refusal=error), ScriptedRunner(error)):
        _assert_refused(serving(runner), runner, status, shown, stream)


def _assert_refused(
    client: TestClient, runner: ScriptedRunner, status: int, shown: Any, stream: bool
) -> None:
    response = client.post("/v1/completions", json={**ASK, "stream": stream})
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.json()["error"].items() >= shown.items()
    assert "secret" not in response.text
    assert response.headers.get("retry-after") == ("3" if status == 429 else None)
    assert all(one.cancelled.is_set() for one in runner.generatings)


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("my_service", {}),
        ("my_model", {}),
        ("my_model:1.0.0", {}),
        ("models/my_model", {}),
        ("base", {"adapter": "base"}),
        ("formal", {"adapter": "formal"}),
        ("formal:2.0.0", {"adapter": "formal:2.0.0"}),
        ("base:formal", {"adapter": "formal"}),
        ("my_service:formal", {"adapter": "formal"}),
        ("my_model:formal", {"adapter": "formal"}),
        ("my_model:1.0.0:formal:2", {"adapter": "formal:2"}),
        ("base:base", {"adapter": "base"}),
        ("my_service:", {"adapter": "my_service:"}),
    ],
)
def test_what_model_names(model: str, fields: dict[str, str]) -> None:
    asked = parse_completion({"model": model, "prompt": "a"}, INFO.model_names)
    assert {k: v for k, v in asked.fields.items() if k == "adapter"} == fields
    assert asked.model == model


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"model": ["my_service"]}, "model"),
        ({"prompt": None}, "prompt"),
        ({"echo": True}, "echo"),
        ({"logprobs": 1}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "b"}, "suffix"),
        ({"user": 1}, "user"),
        ({"adapter": "formal"}, "adapter"),
        ({"stream": 1}, "stream"),
        ({"stream": "true"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
    ],
)
def test_a_field_that_is_wrong_is_named(serving: Serve, fields: Any, param: str) -> None:
    runner = ScriptedRunner()
    response = serving(runner).post("/v1/completions", json={**ASK, **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert param.partition(".")[0] in response.json()["error"]["message"]
    assert runner.asked == []


def test_null_is_left_out_and_user_is_not_used() -> None:
    nulls = dict.fromkeys((*RUNNER_FIELDS, "stream", "stream_options", "echo", "suffix"))
    body = {**nulls, **ASK, "user": "someone", "max_tokens": 5, "stop": ["a"]}
    asked = parse_completion(body, INFO.model_names)
    assert asked.fields == {"prompt": "Hi", "max_tokens": 5, "temperature": 1.0, "stop": ["a"]}
    assert not asked.stream


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["model", "prompt", "stream", "stream_options", "user"]) | st.text(),
        json_values,
    )
)
def test_any_body_is_parsed_or_refused(body: dict[str, Any]) -> None:
    try:
        asked = parse_completion(body, INFO.model_names)
    except InvalidRequestError as exc:
        assert str(exc)
    else:
        assert {"prompt", "max_tokens", "temperature"} <= set(asked.fields)


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("text/plain", b"{}", 415),
        ("application/json", b"{", 400),
        ("application/json", b"[]", 400),
        ("application/json", b" " * 2000, 413),
    ],
)
def test_bodies(serving: Serve, content_type: str, body: bytes, status: int) -> None:
    client = serving(ScriptedRunner(), HTTPSettings(max_body_bytes=1000))
    response = client.post("/v1/completions", content=body, headers={"content-type": content_type})
    assert response.status_code == status
    assert response.json()["error"].items() >= {"type": "invalid_request_error"}.items()


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/completions", 405), ("GET", "/v1/nowhere", 404)]
)
def test_other_paths_speak_the_same(serving: Serve, method: str, path: str, status: int) -> None:
    response = serving(ScriptedRunner()).request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_makes_no_text(serving: Serve, stream: bool) -> None:
    class Custom(ScriptedRunner):
        can_generate = False

    for runner in (EchoRunner(), Custom()):
        client = serving(runner)
        response = client.post("/v1/completions", json={**ASK, "stream": stream})
        assert response.status_code == 404
        assert "does not generate text" in response.json()["error"]["message"]
        assert client.post("/predict", json={"text": "a"}).json()["prediction"] == "a"


class Connection:
    """An ASGI connection of a client that reads so many messages, and may leave."""

    def __init__(self, body: Any, *, reads: int, leaves: bool) -> None:
        self.body = json.dumps(body).encode()
        self.reads, self.leaves = reads, leaves
        self.sent: list[Any] = []
        self.stuck = asyncio.Event()

    async def run(self, app: Any) -> None:
        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "headers": headers,
        }
        await app(scope, self._receive, self._send)

    async def _receive(self) -> Any:
        if self.body:
            body, self.body = self.body, b""
            return {"type": "http.request", "body": body, "more_body": False}
        await self.stuck.wait()
        if not self.leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if len(self.sent) >= self.reads:
            self.stuck.set()
            await asyncio.Event().wait()  # as uvicorn does while the client does not read
        self.sent.append(message)


@pytest.mark.parametrize("reads", [0, 1, 3])
def test_a_client_that_leaves_in_mid_stream_ends_the_generation(serving: Serve, reads: int) -> None:
    runner = ScriptedRunner(*[TextChunk(0, "a", (1,))] * 1000)
    connection = Connection(STREAM, reads=reads, leaves=True)
    asyncio.run(connection.run(serving(runner).app))
    assert runner.generatings[0].cancelled.is_set()
    assert runner.generatings[0].num_chunks <= reads + 1
    assert len(connection.sent) == reads


def test_a_client_that_leaves_before_the_first_text(serving: Serve) -> None:
    never = threading.Event()
    runner = ScriptedRunner(never)
    connection = Connection(STREAM, reads=2, leaves=True)
    connection.stuck.set()
    asyncio.run(connection.run(serving(runner).app))
    assert runner.generatings[0].cancelled.is_set()
    assert connection.sent[0]["status"] == 499


def test_a_client_that_stays_and_does_not_read_is_given_up() -> None:
    released: list[bool] = []

    async def events() -> AsyncGenerator[bytes, None]:
        while True:
            yield b"data: 1\n\n"

    async def run() -> Connection:
        stream = EventStream(
            events(),
            release=lambda: released.append(True),
            deadline_s=time.monotonic() - GRACE_S + 0.05,
        )
        connection = Connection({}, reads=5, leaves=False)
        connection.body = b""
        await connection.run(stream)
        return connection

    assert len(asyncio.run(run()).sent) == 5
    assert released == [True]


def test_the_cancellation_of_a_request_ends_its_generation(serving: Serve) -> None:
    runner = ScriptedRunner(*[TextChunk(0, "a", (1,))] * 1000)
    app = serving(runner).app

    async def run() -> None:
        connection = Connection(STREAM, reads=3, leaves=False)
        task = asyncio.ensure_future(connection.run(app))
        await connection.stuck.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert runner.generatings[0].cancelled.is_set()


def test_a_slow_reader_holds_up_nobody(serving: Serve) -> None:
    runner = ScriptedRunner()
    app = serving(runner).app

    async def run() -> list[Connection]:
        slow = Connection(STREAM, reads=1, leaves=False)
        task = asyncio.ensure_future(slow.run(app))
        await slow.stuck.wait()
        quick = [Connection(STREAM, reads=100, leaves=False) for _ in range(5)]
        await asyncio.gather(*(one.run(app) for one in quick))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return quick

    for connection in asyncio.run(run()):
        assert connection.sent[-1] == {
            "type": "http.response.body",
            "body": b"",
            "more_body": False,
        }
