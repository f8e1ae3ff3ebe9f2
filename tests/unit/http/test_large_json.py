from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_runner import ScriptedRunner
from text_service import events_of, serving_runners

from mlops.engine import TokenLogprobs
from mlops.errors import InvalidRequestError
from mlops.serving.http.completions import parse_completion
from mlops.serving.http.large_json import PIECE, pieces
from mlops.serving.http.several import Several
from mlops.serving.runner.base import TextChunk

NUM_TOKENS = 3 * PIECE + 1
ENTRIES = tuple(
    TokenLogprobs(number, -1.5, ((number, -1.5), (number + 1, -2.5)))
    for number in range(NUM_TOKENS)
)
TOLD = (TextChunk(0, "Hel", (1,)), TextChunk(0, "lo", (2,), "length", ENTRIES))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner),
)


@given(JSON.filter(lambda value: "Infinity" not in json.dumps(value)), st.integers(0, 3 * PIECE))
def test_pieces_are_json(value: Any, number: int) -> None:
    whole = {"long": [value] * number, "short": value}
    assert json.loads("".join(pieces(whole))) == whole
    iterated = {"long": itertools.repeat(value, number), "short": value}
    assert json.loads("".join(pieces(iterated))) == whole


def test_no_piece_has_more_than_some_entries() -> None:
    whole = {"choices": [{"logprobs": {"content": [{"token": 7}] * 10_000}}]}
    assert max(piece.count("token") for piece in pieces(whole)) == PIECE


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        "".join(pieces({"logprobs": [float("nan")] * 2 * PIECE}))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_many_logprobs_come_in_small_events(path: str) -> None:
    asked: dict[str, Any] = {"model": "my_service", "stream": True}
    if "chat" in path:
        asked |= {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True}
    else:
        asked |= {"prompt": "Hi", "logprobs": 2}
    with serving_runners() as serve:
        client = serve(ScriptedRunner(*TOLD))
        events = events_of(client.post(path, json=asked).text)
        whole = client.post(path, json={**asked, "stream": False}).json()
    choices = [one["choices"][0] for one in events[:-1]]
    inner = "content" if "chat" in path else "token_logprobs"
    told = [one["logprobs"][inner] for one in choices if one["logprobs"]]
    assert max(map(len, told)) == PIECE
    assert [entry for part in told for entry in part] == whole["choices"][0]["logprobs"][inner]
    assert [one["finish_reason"] for one in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == "length"
    texts = [one["delta"].get("content", "") if "chat" in path else one["text"] for one in choices]
    assert "".join(texts) == "Hello"


def test_too_many_logprobs_of_all_prompts_are_refused() -> None:
    body = {"model": "m", "n": 16, "max_tokens": 100, "logprobs": 20}
    parse_completion({**body, "prompt": ["a"] * 31}, frozenset("m"))
    with pytest.raises(InvalidRequestError, match="logprobs asks for too many") as refused:
        parse_completion({**body, "prompt": ["a"] * 32}, frozenset("m"))
    assert refused.value.field == "logprobs"


def test_more_answers_than_can_ever_wait_are_refused() -> None:
    runner: Any = ScriptedRunner()
    runner.max_choices = 31
    runner.load_model()
    with pytest.raises(InvalidRequestError, match="32 answers; .* 31 at most") as refused:
        Several(runner, [{"prompt": "a", "n": 16}, {"prompt": "b", "n": 16}], 1.0)
    assert refused.value.field == "prompt"
    assert not runner.asked
