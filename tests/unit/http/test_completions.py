from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any

import pytest
from echo_runner import EchoRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from text_runner import LONG_S, ScriptedGenerating, ScriptedRunner
from text_service import INFO, Serve, events_of, serving_runners

from mlops.engine import TokenLogprobs
from mlops.errors import (
    AdapterNotFoundError,
    DeadlineExceededError,
    EngineError,
    EngineShutdownError,
    InvalidRequestError,
    QueueFullError,
)
from mlops.serving.http import HTTPSettings
from mlops.serving.http.completions import parse_completion
from mlops.serving.http.records import record_of
from mlops.serving.http.schemas import CompletionBody
from mlops.serving.http.sse import GRACE_S, EventStream
from mlops.serving.runner.base import TextChunk

ASK = {"model": "my_service", "prompt": "Hi"}
STREAM = {**ASK, "stream": True}
USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "total_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 2},
}


@pytest.fixture
def serving() -> Iterator[Serve]:
    with serving_runners() as serve:
        yield serve


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


def test_several_prompts(serving: Serve) -> None:
    runner = ScriptedRunner(
        TextChunk(0, "a", (1,)), TextChunk(1, "b", (2,), "stop"), TextChunk(0, "c", (3,), "length")
    )
    client = serving(runner)
    body = {**ASK, "prompt": ["x", "y"], "n": 2}
    answer = client.post("/v1/completions", json=body).json()
    assert [one["prompt"] for one in runner.asked] == ["x", "y"]
    assert [(c["index"], c["text"], c["finish_reason"]) for c in answer["choices"]] == [
        (0, "ac", "length"),
        (1, "b", "stop"),
        (2, "ac", "length"),
        (3, "b", "stop"),
    ]
    assert answer["usage"] == {
        "prompt_tokens": 6,
        "completion_tokens": 6,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    *events, usage, done = events_of(client.post("/v1/completions", json=body).text)
    assert done == "[DONE]"
    assert usage["usage"] == answer["usage"]
    texts = dict.fromkeys(range(4), "")
    for event in events:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == {0: "ac", 1: "b", 2: "ac", 3: "b"}


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ([5, 6], [[5, 6]]),
        ([[5, 6]], [[5, 6]]),
        ([[5], [6]], [[5], [6]]),
        (["a"], ["a"]),
        (["a"] * 64, ["a"] * 64),
    ],
)
def test_token_ids_and_lists(serving: Serve, prompt: Any, asked: Any) -> None:
    runner = ScriptedRunner()
    answer = serving(runner).post("/v1/completions", json={**ASK, "prompt": prompt}).json()
    assert [one["prompt"] for one in runner.asked] == asked
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(asked)))


class RefusesLater(ScriptedRunner):
    """Takes the first prompts, and one that never ends, and refuses the others."""

    def __init__(self, error: Exception, *, at_once: bool) -> None:
        super().__init__(threading.Event())
        self.error, self.at_once = error, at_once

    def generate(
        self, input_data: Mapping[str, Any], *, deadline_s: float | None = None
    ) -> ScriptedGenerating:
        if len(self.generatings) == 2:
            if self.at_once:
                raise self.error
            self.pieces = (self.error,)
        return super().generate(input_data, deadline_s=deadline_s)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
def test_one_refused_prompt_ends_all(serving: Serve, at_once: bool, stream: bool) -> None:
    runner = RefusesLater(QueueFullError("too many", retry_after_s=1), at_once=at_once)
    body = {**ASK, "prompt": ["a", "b", "c", "d"], "stream": stream}
    response = serving(runner).post("/v1/completions", json=body)
    assert response.status_code == 429
    assert len(runner.generatings) >= 2
    assert all(one.cancelled.is_set() for one in runner.generatings)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_fails_later_ends_all(serving: Serve, stream: bool) -> None:
    class Fails(ScriptedRunner):
        def generate(
            self, input_data: Mapping[str, Any], *, deadline_s: float | None = None
        ) -> ScriptedGenerating:
            if self.generatings:
                self.pieces = (TextChunk(0, "a", (1,)), threading.Event())
            return super().generate(input_data, deadline_s=deadline_s)

    runner = Fails(TextChunk(0, "a", (1,)), EngineError("a step failed"))
    body = {**ASK, "prompt": ["a", "b", "c"], "stream": stream}
    response = serving(runner).post("/v1/completions", json=body)
    if stream:
        assert set(events_of(response.text)[-1]) == {"error"}
    else:
        assert response.status_code == 500
    assert [one.cancelled.is_set() for one in runner.generatings] == [True] * 3


def told(token: int, logprob: float, *top: tuple[int, float]) -> TokenLogprobs:
    return TokenLogprobs(token, logprob, top)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(serving: Serve, stream: bool) -> None:
    runner = ScriptedRunner(
        TextChunk(0, "Hi", (1,), None, (told(1, -0.5, (1, -0.5), (2, -1.0)),)),
        TextChunk(0, "", (3,), None, (told(3, float("-inf"), (1, float("nan")), (4, -1.5)),)),
        TextChunk(0, "é!", (4, 2), "length", (told(4, -0.25), told(2, -2.0, (2, -2.0)))),
    )
    runner.words = {1: b" Hi", 2: b"!", 3: b"\xc3", 4: b"\xa9"}
    body = {**ASK, "logprobs": 2, "stream": stream}
    response = serving(runner).post("/v1/completions", json=body)
    assert runner.asked[0]["logprobs"] == 2
    if stream:
        parts = [event["choices"][0]["logprobs"] for event in events_of(response.text)[:-1]]
        assert [len(part["tokens"]) for part in parts] == [1, 1, 2]
        logprobs = {name: [one for part in parts for one in part[name]] for name in parts[0]}
    else:
        logprobs = response.json()["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": [" Hi", "bytes:\\xc3", "bytes:\\xa9", "!"],
        "token_logprobs": [-0.5, -9999.0, -0.25, -2.0],
        "top_logprobs": [
            {" Hi": -0.5, "!": -1.0},
            {" Hi": -9999.0, "bytes:\\xa9": -1.5, "bytes:\\xc3": -9999.0},
            {"bytes:\\xa9": -0.25},
            {"!": -2.0},
        ],
        "text_offset": [0, 2, 2, 3],  # of "Hié!"
    }


def test_text_that_waits_for_more_makes_no_event(serving: Serve) -> None:
    runner = ScriptedRunner(TextChunk(0, "", (1,)), TextChunk(0, "a", (2,), "stop"))
    events = events_of(serving(runner).post("/v1/completions", json=STREAM).text)
    assert len(events) == 2


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
    assert response.headers.get("retry-after") == {429: "3", 503: "1"}.get(status)
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
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"temperature": 11}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"seed": 2**63}, "seed"),
        ({"top_k": -1}, "top_k"),
        ({"n": 17}, "n"),
        ({"max_tokens": 1.0}, "max_tokens"),
        ({"ignore_eos": "no"}, "ignore_eos"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": [None]}, "prompt"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "b"}, "suffix"),
        ({"user": 1}, "user"),
        ({"adapter": "formal"}, "adapter"),
        ({"stream": 1}, "stream"),
        ({"stream": "true"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
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
    nulls = dict.fromkeys((*CompletionBody.model_fields, "echo", "suffix"))
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
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "headers": headers,
        }
        await app(self.scope, self._receive, self._send)

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
    record = record_of(connection.scope)  # the log knows what it got
    num_tokens = runner.generatings[0].num_chunks if reads else 0
    assert (record.status, record.completion_tokens) == (499, num_tokens)


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
            deadline_s=time.monotonic() - GRACE_S + 0.5,
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
