"""What a client may ask for, and how it is told that it may not."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from mlops.engine import GenerationRequest, Sampling, parse_request
from mlops.errors import InvalidRequestError


def test_a_text_alone_is_a_request() -> None:
    request = parse_request("Hello")
    assert request.source == "text"
    assert request.messages == ({"role": "user", "content": "Hello"},)
    assert request.max_tokens is None
    assert request.sampling == Sampling()
    assert not request.names_adapter


def test_every_field_arrives() -> None:
    request = parse_request(
        {
            "input": "Hello",
            "max_tokens": 7,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 3,
            "min_p": 0.1,
            "seed": 5,
            "stop": "END",
            "adapter": "style",
        }
    )
    assert request.max_tokens == 7
    assert request.sampling == Sampling(0.5, 0.9, 3, 0.1, 5)
    assert request.stop == ("END",)
    assert (request.names_adapter, request.adapter) == (True, "style")


def test_null_is_a_field_left_out_but_for_the_adapter() -> None:
    fields = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop")
    request = parse_request({"text": "a", **dict.fromkeys(fields)})
    assert request == parse_request("a")
    for name in (None, "base"):
        request = parse_request({"text": "a", "adapter": name})
        assert (request.names_adapter, request.adapter) == (True, None)


def test_a_raw_prompt_is_no_conversation() -> None:
    request = parse_request({"prompt": "Once upon"})
    assert (request.text, request.messages) == ("Once upon", ())


@pytest.mark.parametrize(
    ("data", "field", "said"),
    [
        ({}, "text", "exactly one of text, input, prompt, messages"),
        ({"text": "a", "prompt": "b"}, "prompt", "this one has text and prompt"),
        ({"text": ""}, "text", "not ''"),
        ({"text": 3}, "text", "not 3"),
        ({"text": ["a"]}, "text", "a list of 1"),
        ({"text": "\ud800"}, "text", "surrogate"),
        ({"text": "a", "max_tokens": 0}, "max_tokens", "an integer from 1, not 0"),
        ({"text": "a", "max_tokens": True}, "max_tokens", "not True"),
        ({"text": "a", "max_tokens": 1.5}, "max_tokens", "not 1.5"),
        ({"text": "a", "max_tokens": "10"}, "max_tokens", "not '10'"),
        ({"text": "a", "temperature": float("nan")}, "temperature", "from 0 to 10, not nan"),
        ({"text": "a", "temperature": float("inf")}, "temperature", "not inf"),
        ({"text": "a", "temperature": -0.1}, "temperature", "not -0.1"),
        ({"text": "a", "temperature": 10**5000}, "temperature", "more than 20 digits"),
        ({"text": "a", "top_p": 0}, "top_p", "above 0"),
        ({"text": "a", "top_p": 1.01}, "top_p", "not 1.01"),
        ({"text": "a", "top_k": -1}, "top_k", "not -1"),
        ({"text": "a", "min_p": 2}, "min_p", "not 2"),
        ({"text": "a", "seed": 2**63}, "seed", "not 9223372036854775808"),
        ({"text": "a", "seed": -1}, "seed", "not -1"),
        ({"text": "a", "stop": [""]}, "stop", "1 to 256 characters"),
        ({"text": "a", "stop": [1]}, "stop", "not 1"),
        ({"text": "a", "stop": {"a": 1}}, "stop", "an object with 1 fields"),
        ({"text": "a", "stop": ["a"] * 17}, "stop", "at most 16"),
        ({"text": "a", "adapter": ""}, "adapter", "name"),
        ({"text": "a", "adapter": 1}, "adapter", "name"),
        ({"text": "a", "temprature": 1}, "temprature", "unknown field 'temprature'; allowed are"),
        ({"text": "a", 3: 1}, "3", "unknown field"),
        ({"messages": []}, "messages", "1 to 1024 messages"),
        ({"messages": "hello"}, "messages", "not 'hello'"),
        ({"messages": ["hello"]}, "messages[0]", "role and content"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "role and content"),
        ({"messages": [{"role": "cat", "content": ""}]}, "messages[0].role", "one of system"),
        ({"messages": [{"role": ["x"], "content": ""}]}, "messages[0].role", "a list of 1"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content", "a text"),
        (["a"], "", "a list of 1"),
        (None, "", "not None"),
    ],
)
def test_a_bad_request_names_field_value_and_what_is_allowed(
    data: Any, field: str, said: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_request(data)
    assert caught.value.field == field
    assert said in caught.value.message
    assert len(caught.value.message) < 300
    assert pickle.loads(pickle.dumps(caught.value)).field == field  # noqa: S301


def test_a_generation_needs_tokens() -> None:
    with pytest.raises(InvalidRequestError, match="no tokens"):
        GenerationRequest(())
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        GenerationRequest((1,), max_tokens=0)
