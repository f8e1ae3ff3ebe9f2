"""From a client's request to token ids, with a tokenizer and numbers but no model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mlops.engine.prompts import to_generation_request
from mlops.engine.request import GenerationRequest, Sampling, parse_request
from mlops.engine.token_bound import TokenBound
from mlops.errors import InvalidRequestError, PromptTooLongError


class LetterTokenizer:
    """A token for each character, by its code; 1 begins a text."""

    bos_token = "\x01"
    has_chat_template = True
    has_tool_calling = False

    chat_template = None  # it is a program

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [1] * add_special_tokens + [ord(one) for one in text]

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize
        if any(message["role"] == "tool" for message in messages):
            raise ValueError("no tools here")
        text = "".join(message["content"] for message in messages)
        return f"\x02{text}" + "\x03" * add_generation_prompt


def generation_of(data: Any, **how: Any) -> GenerationRequest:
    tokenizer = LetterTokenizer()
    numbers = {"context_tokens": 10, "vocabulary_size": 128}
    loaded: Any = SimpleNamespace(tokenizer=tokenizer, token_bound=TokenBound(tokenizer), **numbers)
    return to_generation_request(loaded, parse_request(data), **{"adapter": None, **how})


def test_a_prompt_becomes_tokens() -> None:
    assert generation_of({"prompt": "ab"}).prompt == (1, 97, 98)
    assert generation_of({"prompt": "\x01ab"}).prompt == (1, 97, 98)
    assert generation_of("ab").prompt == (2, 97, 98, 3)
    assert generation_of({"prompt": [5, 0, 127]}).prompt == (5, 0, 127)


def test_every_field_is_passed_on() -> None:
    data = {
        "prompt": [5],
        "max_tokens": 9,
        "temperature": 0.5,
        "logit_bias": {"127": 1},
        "stop": ["x"],
        "stop_token_ids": [127],
        "ignore_eos": True,
        "logprobs": 2,
        "n": 2,
    }
    assert generation_of(data, adapter="style", deadline_s=3.0, cache_salt="s") == (
        GenerationRequest(
            (5,),
            9,
            Sampling(temperature=0.5, logit_bias=((127, 1),)),
            ("x",),
            "style",
            deadline_s=3.0,
            stop_token_ids=(127,),
            ignore_eos=True,
            logprobs=2,
            cache_salt="s",
        )
    )


def test_without_max_tokens_the_context_is_the_limit() -> None:
    assert generation_of({"prompt": [5] * 4}).max_tokens == 6


@pytest.mark.parametrize(
    ("data", "field", "said"),
    [
        ({"prompt": [5] * 10}, "prompt", "10 tokens; the model's context of 10"),
        ({"prompt": [5] * 4, "max_tokens": 7}, "max_tokens", "an integer from 1 to 6"),
        ({"prompt": [128]}, "prompt", "does not know (128 of 128)"),
        ({"prompt": "é"}, "prompt", "does not know (233 of 128)"),
        ({"prompt": "a", "stop_token_ids": [1, 128]}, "stop_token_ids", "128 of 128"),
        ({"prompt": "a", "logit_bias": {"999": 1}}, "logit_bias", "999 of 128"),
        (
            {"messages": [{"role": "tool", "tool_call_id": "1", "content": "a"}]},
            "messages",
            "no tools here",
        ),
        (
            {
                "messages": [{"role": "user", "content": "a"}],
                "tools": [{"type": "function", "function": {"name": "f"}}],
            },
            "tools",
            "tools cannot be used with this model",
        ),
    ],
)
def test_what_the_model_cannot_take_is_refused(data: Any, field: str, said: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        generation_of(data)
    assert caught.value.field == field
    assert said in caught.value.message


@pytest.mark.parametrize("data", [{"prompt": [5] * 10}, {"prompt": [5] * 4, "max_tokens": 7}])
def test_what_does_not_fit_the_context_has_a_class_of_its_own(data: Any) -> None:
    with pytest.raises(PromptTooLongError):
        generation_of(data)


def test_a_prompt_over_the_operators_limit_is_refused() -> None:
    assert generation_of({"prompt": [5] * 4}, max_prompt_tokens=4).prompt == (5, 5, 5, 5)
    with pytest.raises(PromptTooLongError, match="messages has 5 tokens; this service takes 4"):
        generation_of({"messages": [{"role": "user", "content": "abc"}]}, max_prompt_tokens=4)
