"""What a client may ask for, and how it is told that it may not."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops.engine.request import (
    FIELDS,
    MAX_SEED,
    GenerationRequest,
    Sampling,
    parse_request,
    split_choices,
)
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
            "repetition_penalty": 1.5,
            "presence_penalty": -1,
            "frequency_penalty": 2,
            "logit_bias": {"17": -100, 3: 0.5},
            "stop": "END",
            "stop_token_ids": [4, 2],
            "ignore_eos": True,
            "logprobs": 0,
            "n": 3,
            "adapter": "style",
        }
    )
    assert request.max_tokens == 7
    assert request.sampling == Sampling(0.5, 0.9, 3, 0.1, 5, 1.5, -1, 2, ((17, -100), (3, 0.5)))
    assert (request.stop, request.stop_token_ids) == (("END",), (4, 2))
    assert (request.ignore_eos, request.logprobs, request.n) == (True, 0, 3)
    assert (request.names_adapter, request.adapter) == (True, "style")


def test_null_is_a_field_left_out_but_for_the_adapter() -> None:
    fields = [name for name in FIELDS if name not in ("text", "input", "prompt", "messages")]
    fields.remove("adapter")
    request = parse_request({"text": "a", **dict.fromkeys(fields)})
    assert request == parse_request("a")
    for name in (None, "base"):
        request = parse_request({"text": "a", "adapter": name})
        assert (request.names_adapter, request.adapter) == (True, None)


def test_a_raw_prompt_is_no_conversation() -> None:
    request = parse_request({"prompt": "Once upon"})
    assert (request.text, request.messages) == ("Once upon", ())


def test_a_prompt_may_be_token_ids() -> None:
    request = parse_request({"prompt": [0, 5, 2**31 - 1]})
    assert (request.source, request.text, request.messages) == ("prompt", "", ())
    assert request.token_ids == (0, 5, 2**31 - 1)
    assert parse_request({"prompt": "5"}).token_ids is None


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
        ({"text": "a", "stop": {"a": 1}}, "stop", "an object with 1 field"),
        ({"text": "a", "stop": ["a"] * 17}, "stop", "at most 16"),
        ({"text": "a", "repetition_penalty": 0}, "repetition_penalty", "above 0, at most 10"),
        ({"text": "a", "repetition_penalty": 11}, "repetition_penalty", "not 11"),
        ({"text": "a", "repetition_penalty": float("nan")}, "repetition_penalty", "not nan"),
        ({"text": "a", "presence_penalty": 2.1}, "presence_penalty", "from -2 to 2, not 2.1"),
        ({"text": "a", "frequency_penalty": "1"}, "frequency_penalty", "not '1'"),
        ({"text": "a", "logit_bias": [1]}, "logit_bias", "an object from token ids to numbers"),
        ({"text": "a", "logit_bias": {"a": 1}}, "logit_bias", "integers from 0, not 'a'"),
        ({"text": "a", "logit_bias": {"-1": 1}}, "logit_bias", "not '-1'"),
        ({"text": "a", "logit_bias": {"01": 1}}, "logit_bias", "not '01'"),
        ({"text": "a", "logit_bias": {"9" * 9999: 1}}, "logit_bias", "not '9999"),
        ({"text": "a", "logit_bias": {"٣": 1}}, "logit_bias", "not '٣'"),
        ({"text": "a", "logit_bias": {True: 1}}, "logit_bias", "not True"),
        ({"text": "a", "logit_bias": {2**31: 1}}, "logit_bias", "not 2147483648"),
        ({"text": "a", "logit_bias": {1: 1, "1": 2}}, "logit_bias", "at most once"),
        ({"text": "a", "logit_bias": {"1": 100.5}}, "logit_bias", "from -100 to 100, not 100.5"),
        ({"text": "a", "logit_bias": {"1": None}}, "logit_bias", "not None"),
        ({"text": "a", "logit_bias": {"1": float("inf")}}, "logit_bias", "not inf"),
        (
            {"text": "a", "logit_bias": dict.fromkeys(range(1025), 1)},
            "logit_bias",
            "at most 1024 token ids",
        ),
        ({"text": "a", "stop_token_ids": 3}, "stop_token_ids", "a list of 0 to 256 token ids"),
        ({"text": "a", "stop_token_ids": [1] * 257}, "stop_token_ids", "not a list of 257"),
        ({"text": "a", "stop_token_ids": [1.0]}, "stop_token_ids", "not 1.0"),
        ({"text": "a", "stop_token_ids": [-1]}, "stop_token_ids", "integers from 0, not -1"),
        ({"text": "a", "ignore_eos": 1}, "ignore_eos", "true or false, not 1"),
        ({"text": "a", "logprobs": 21}, "logprobs", "an integer from 0 to 20, not 21"),
        ({"text": "a", "logprobs": True}, "logprobs", "not True"),
        ({"text": "a", "n": 0}, "n", "an integer from 1 to 16, not 0"),
        ({"text": "a", "n": 17}, "n", "not 17"),
        ({"prompt": []}, "prompt", "1 to 1000000 token ids, not a list of 0"),
        ({"prompt": [0] * 1_000_001}, "prompt", "not a list of 1000001"),
        ({"prompt": ["a"]}, "prompt", "token ids, integers from 0, not 'a'"),
        ({"prompt": [[1]]}, "prompt", "not a list of 1"),
        ({"prompt": [True]}, "prompt", "not True"),
        ({"prompt": [2**31]}, "prompt", "not 2147483648"),
        ({"prompt": 3}, "prompt", "a text that is not empty, or a list of token ids, not 3"),
        ({"prompt": None}, "prompt", "not None"),
        ({"text": "a", "adapter": ""}, "adapter", "name"),
        ({"text": "a", "adapter": 1}, "adapter", "name"),
        ({"text": "a", "temprature": 1}, "temprature", "unknown field 'temprature'; allowed are"),
        ({"text": "a", 3: 1}, "3", "unknown field"),
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
    assert len(caught.value.message) < 400
    assert pickle.loads(pickle.dumps(caught.value)).field == field  # noqa: S301


def test_a_generation_needs_tokens() -> None:
    with pytest.raises(InvalidRequestError, match="no tokens"):
        GenerationRequest(())
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        GenerationRequest((1,), max_tokens=0)
    for field, value in (("stop_token_ids", (-1,)), ("ignore_eos", 1), ("logprobs", 21)):
        with pytest.raises(InvalidRequestError, match=field):
            GenerationRequest((1,), **{field: value})  # type: ignore[arg-type]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(FIELDS), json_values))
def test_whatever_comes_is_taken_or_refused(data: dict[str, Any]) -> None:
    try:
        parse_request(data)
    except InvalidRequestError as exc:
        assert len(exc.message) < 400


def test_choices_have_seeds_of_their_own() -> None:
    request = GenerationRequest((1,), sampling=Sampling(temperature=1.0, seed=MAX_SEED))
    assert split_choices(request, 1) == [request]
    seeds = [one.sampling.seed for one in split_choices(request, 3)]
    assert seeds == [MAX_SEED, 0, 1]
    unseeded = GenerationRequest((1,), logprobs=2)
    assert split_choices(unseeded, 2) == [unseeded, unseeded]
