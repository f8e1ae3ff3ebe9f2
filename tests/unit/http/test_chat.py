from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_runner import LONG_S, ScriptedRunner
from text_service import INFO, Serve, events_of, serving_runners

from mlops.engine import TokenLogprobs
from mlops.engine.tools import ToolCall
from mlops.errors import (
    AdapterNotFoundError,
    EngineError,
    InvalidRequestError,
    PromptTooLongError,
)
from mlops.serving.http import HTTPSettings
from mlops.serving.http.chat import parse_chat
from mlops.serving.http.schemas import ChatCompletionBody
from mlops.serving.runner.base import TextChunk

MESSAGES = [{"role": "user", "content": "Hi"}]
ASK = {"model": "my_service", "messages": MESSAGES}
STREAM = {**ASK, "stream": True}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
CALLS = (ToolCall("weather", '{"city": "Köln"}'), ToolCall("weather", "{}"))


@pytest.fixture
def serving() -> Iterator[Serve]:
    with serving_runners() as serve:
        yield serve


def ask(serving: Serve, runner: ScriptedRunner, **fields: Any) -> Any:
    response = serving(runner).post("/v1/chat/completions", json={**ASK, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def stream(serving: Serve, runner: ScriptedRunner, **fields: Any) -> list[Any]:
    response = serving(runner).post("/v1/chat/completions", json={**STREAM, **fields})
    assert response.status_code == 200, response.text
    return events_of(response.text)


def test_an_answer(serving: Serve) -> None:
    runner = ScriptedRunner()
    body = ask(serving, runner)
    assert body.pop("id").startswith("chatcmpl-")
    assert abs(body.pop("created") - time.time()) < LONG_S
    assert body == {
        "object": "chat.completion",
        "model": "my_service",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }
    assert runner.asked == [{"messages": MESSAGES, "temperature": 1.0}]


def test_a_stream(serving: Serve) -> None:
    *events, done = stream(serving, ScriptedRunner())
    assert done == "[DONE]"
    assert [event["choices"] for event in events] == [
        [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": "", "refusal": None},
                "logprobs": None,
                "finish_reason": None,
            }
        ],
        [{"index": 0, "delta": {"content": "Hel"}, "logprobs": None, "finish_reason": None}],
        [{"index": 0, "delta": {"content": "lo"}, "logprobs": None, "finish_reason": "length"}],
    ]
    assert len({(event["id"], event["created"]) for event in events}) == 1
    assert all(event["object"] == "chat.completion.chunk" for event in events)
    assert not any("usage" in event for event in events)


def test_a_stream_with_usage_and_choices(serving: Serve) -> None:
    runner = ScriptedRunner(
        TextChunk(1, "b", (1,), "stop"), TextChunk(0, "a", (2,)), TextChunk(0, "", (), "length")
    )
    options = {"include_usage": True}
    *events, usage, _ = stream(serving, runner, n=2, stream_options=options)
    assert [event["usage"] for event in events] == [None] * 5
    assert [event["choices"][0]["index"] for event in events] == [1, 1, 0, 0, 0]
    assert [event["choices"][0]["delta"].get("role") for event in events] == [
        "assistant",
        None,
        "assistant",
        None,
        None,
    ]
    assert events[-1]["choices"][0]["delta"] == {}
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 5


@pytest.mark.parametrize(("said", "content"), [("", None), ("Let me see.", "Let me see.")])
def test_calls_of_functions(serving: Serve, said: str, content: str | None) -> None:
    runner = ScriptedRunner(
        TextChunk(0, said, (1,), tool_calls=CALLS[:1]),
        TextChunk(0, "", (2,), "tool_calls", tool_calls=CALLS[1:]),
    )
    (choice,) = ask(serving, runner, tools=TOOLS)["choices"]
    assert runner.asked[0]["tools"] == TOOLS
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == content
    calls = choice["message"]["tool_calls"]
    ids = {call.pop("id") for call in calls}
    assert len(ids) == len(calls) and {len(one) for one in ids} == {9}
    assert calls == [
        {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}},
        {"type": "function", "function": {"name": "weather", "arguments": "{}"}},
    ]

    *events, _ = stream(serving, runner, tools=TOOLS)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == said
    streamed = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert len({call.pop("id") for call in streamed}) == 2
    assert streamed == [{"index": number, **call} for number, call in enumerate(calls)]
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("stream_it", [False, True])
def test_logprobs(serving: Serve, stream_it: bool) -> None:
    runner = ScriptedRunner(
        TextChunk(0, "Hi", (1,), None, (TokenLogprobs(1, -0.5, ((1, -0.5), (2, -1.0))),)),
        TextChunk(0, "", (2,), "stop", (TokenLogprobs(2, float("nan"), ((3, -float("inf")),)),)),
    )
    runner.words = {1: b"Hi", 2: b"\xe2\x82", 3: b"!"}
    fields = {"logprobs": True, "top_logprobs": 2}
    if stream_it:
        told = [
            event["choices"][0]["logprobs"] for event in stream(serving, runner, **fields)[1:-1]
        ]
        content = [one for part in told for one in part["content"]]
    else:
        (choice,) = ask(serving, runner, **fields)["choices"]
        assert choice["logprobs"]["refusal"] is None
        content = choice["logprobs"]["content"]
    assert runner.asked[0]["logprobs"] == 2
    assert content == [
        {
            "token": "Hi",
            "logprob": -0.5,
            "bytes": [72, 105],
            "top_logprobs": [
                {"token": "Hi", "logprob": -0.5, "bytes": [72, 105]},
                {"token": "\\xe2\\x82", "logprob": -1.0, "bytes": [0xE2, 0x82]},
            ],
        },
        {
            "token": "\\xe2\\x82",
            "logprob": -9999.0,
            "bytes": [0xE2, 0x82],
            "top_logprobs": [{"token": "!", "logprob": -9999.0, "bytes": [33]}],
        },
    ]


def test_an_error_in_mid_stream_ends_it(serving: Serve) -> None:
    runner = ScriptedRunner(TextChunk(0, "a", (1,)), EngineError("secret"))
    *_, last = stream(serving, runner)
    assert set(last) == {"error"}
    assert "secret" not in json.dumps(last)


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({}, {}),
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": None, "max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"temperature": 0, "top_k": 3, "seed": 1}, {"temperature": 0, "top_k": 3, "seed": 1}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": False}, {}),
        ({"model": "base:formal"}, {"adapter": "formal"}),
        ({"user": "someone"}, {}),
        ({"tools": TOOLS, "tool_choice": "none"}, {"tools": TOOLS, "tool_choice": "none"}),
        ({"parallel_tool_calls": False}, {"parallel_tool_calls": False}),
        ({"response_format": {"type": "text"}}, {"response_format": {"type": "text"}}),
        ({"stop": ["a"], "logit_bias": {"1": 2}}, {"stop": ["a"], "logit_bias": {"1": 2}}),
    ],
)
def test_what_the_runner_is_asked(fields: dict[str, Any], asked: dict[str, Any]) -> None:
    question = parse_chat({**ASK, **fields}, INFO.model_names)
    assert question.fields == {"messages": MESSAGES, "temperature": 1.0, **asked}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_completion_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"functions": []}, "functions"),
        ({"prompt": "a"}, "prompt"),
        ({"metadata": {}}, "metadata"),
        ({"stream_options": {}}, "stream_options"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ],
)
def test_a_field_that_is_wrong_is_named(serving: Serve, fields: Any, param: str) -> None:
    runner = ScriptedRunner()
    response = serving(runner).post("/v1/chat/completions", json={**ASK, **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert param in response.json()["error"]["message"]
    assert runner.asked == []


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_limit_is_called_what_the_client_calls_it(serving: Serve, name: str) -> None:
    error = PromptTooLongError("max_tokens must be an integer from 1 to 9, not 99", "max_tokens")
    response = serving(ScriptedRunner(error)).post("/v1/chat/completions", json={**ASK, name: 99})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert response.json()["error"]["param"] == name
    assert response.json()["error"]["message"] == f"{name} must be an integer from 1 to 9, not 99"


def test_an_unknown_model(serving: Serve) -> None:
    runner = ScriptedRunner(AdapterNotFoundError("there is no adapter 'x'"))
    response = serving(runner).post("/v1/chat/completions", json={**ASK, "model": "x"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "the model 'x' does not exist" in response.json()["error"]["message"]


def test_unknown_fields_without_end_are_refused_at_the_first(serving: Serve) -> None:
    many = {f"field{number}": 1 for number in range(100_000)}
    for fields in (many, {"stream": True, "stream_options": many}):
        response = serving(ScriptedRunner()).post("/v1/chat/completions", json={**ASK, **fields})
        assert response.status_code == 400
        assert response.json()["error"]["param"].endswith("field0")
        assert len(response.text) < 1000


@pytest.mark.parametrize("log_prompts", [False, True])
@pytest.mark.parametrize("stream_it", [False, True])
def test_prompts_are_logged_only_where_that_is_wanted(
    serving: Serve, caplog: pytest.LogCaptureFixture, log_prompts: bool, stream_it: bool
) -> None:
    messages = [{"role": "user", "content": "a private matter"}]
    client = serving(ScriptedRunner(), HTTPSettings(log_prompts=log_prompts))
    with caplog.at_level("INFO"), client:
        body = {**ASK, "messages": messages, "stream": stream_it}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert ("a private matter" in caplog.text) == log_prompts


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(list(ChatCompletionBody.model_fields)), json_values),
    st.booleans(),
)
def test_any_body_is_parsed_or_refused(body: dict[str, Any], is_complete: bool) -> None:
    if is_complete:
        body = {**body, **ASK}
    try:
        question = parse_chat(body, INFO.model_names)
    except InvalidRequestError as exc:
        assert str(exc)
        assert exc.field.partition(".")[0] in ChatCompletionBody.model_fields
    else:
        assert {"messages", "temperature"} <= set(question.fields)
