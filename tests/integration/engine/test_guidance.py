"""Schemas and grammars that clients send: what is refused, and what it may cost to find out."""

from __future__ import annotations

import gc
import json
import os
import signal
import string
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import tiny_models
from mlops.engine.guidance import (
    MAX_COMPILED,
    Guidance,
    Guide,
    allowed_tokens,
    json_grammar,
    lark_grammar,
)
from mlops.engine.response_format import write_schema
from mlops.errors import EngineError, InvalidRequestError

END = tiny_models.vocabulary_size() - 1


def load(folder: Path) -> Any:
    from mlx_lm.tokenizer_utils import load as load_tokenizer

    return load_tokenizer(folder)


def write(folder: Path, tokenizer: Any, end: str) -> Any:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load(folder)


def sentencepiece(folder: Path, pieces: list[str]) -> Any:
    names = ["<end>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<end>"])
    return write(folder, tokenizer, "<end>")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One token per byte."""
    return load(tiny_models.write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def guidance(tokenizer: Any) -> Guidance:
    return Guidance(tokenizer)


def allowed(guide: Guide, size: int = END + 1) -> set[int]:
    return set(np.flatnonzero(allowed_tokens([guide], size)[0]).tolist())


def compile_schema(guidance: Guidance, schema: dict[str, Any]) -> None:
    guidance.compile(json_grammar(write_schema("response_format", schema)))


# Hostile schemas.


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def all_of(patterns: list[str]) -> dict[str, Any]:
    return {"type": "string", "allOf": [{"pattern": pattern} for pattern in patterns]}


def with_defs(schema: dict[str, Any], **defs: Any) -> dict[str, Any]:
    return {"$defs": defs, **schema}


PATTERN_PROPERTIES = {
    "type": "object",
    "patternProperties": {f"^{i}(?:\\p{{L}}{{{i + 1},100}}-)*$": {} for i in range(10, 60)},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no type": ({"type": "person"}, "person"),
    "not": ({"not": {"type": "string"}}, "not"),
    "unknown format": ({"type": "string", "format": "phone"}, "phone"),
    "look-ahead": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "no pattern": ({"type": "string", "pattern": "("}, "unclosed group"),
    "remote": ({"$ref": "http://127.0.0.1:9/a.json"}, "127.0.0.1"),
    "file": ({"$ref": "file:///etc/passwd"}, "passwd"),
    "missing": ({"$ref": "#/$defs/none"}, "none"),
    "itself": ({"$ref": "#"}, "nothing follows it"),
    "circle": (with_defs({"$ref": "#/$defs/a"}, a={"$ref": "#/$defs/a"}), "nothing follows it"),
    "impossible": ({"type": "string", "minLength": 3, "maxLength": 2}, ""),
    "huge number": ({"type": "string", "maxLength": 10**400}, ""),
    "deep": (nested(200), "recursion"),
    "deeper": (nested(2000), "nested too deeply"),
    "deep groups": ({"type": "string", "pattern": "(" * 3000 + ")" * 3000}, ""),
    "together": (all_of([f"[a-z]{{{number}}}x.*y" for number in range(1, 60)]), "too complex"),
    "names": (
        with_defs(
            {"anyOf": [{"$ref": "#/$defs/a", "minProperties": i} for i in range(1, 400)]},
            a=PATTERN_PROPERTIES,
        ),
        "too complex",
    ),
    "product": (
        {"allOf": [{"anyOf": [{"minLength": i + j} for j in range(3)]} for i in range(30)]},
        "too large",
    ),
    "multiples": ({"type": "integer", "multipleOf": 999_999_937}, ""),
}


@pytest.mark.parametrize("name", [*REFUSED])
def test_a_schema_that_cannot_be_used_is_refused_in_one_sentence(
    guidance: Guidance, name: str
) -> None:
    schema, says = REFUSED[name]
    with pytest.raises(InvalidRequestError) as caught:
        compile_schema(guidance, schema)
    assert caught.value.field.startswith("response_format")
    assert says in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300


LARGE: dict[str, dict[str, Any]] = {
    "items": {"type": "array", "minItems": 10**9},
    "most items": {"type": "array", "maxItems": 10**9},
    "length": {"type": "string", "minLength": 10**9},
    "enum": {"enum": [f"{i:x}" for i in range(6000)]},
    "long constant": {"const": "x" * 60000},
    "states": {"type": "string", "pattern": "^(a|b)*a(a|b){200}$"},
    "repetitions": {"type": "string", "pattern": "^((((a{1,99}){1,99}){1,99}){1,99}){1,99}$"},
    "alternatives": {"type": "string", "pattern": "|".join(f"{i}.*" for i in range(6000))},
    "laughs": with_defs(
        {"$ref": "#/$defs/a0"},
        a12={"type": "string"},
        **{f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 10} for i in range(12)},
    ),
    "chain": with_defs(
        {"$ref": "#/$defs/a0"},
        a1000={"type": "string"},
        **{f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(1000)},
    ),
}


@pytest.mark.parametrize("name", [*LARGE])
def test_a_large_schema_can_be_used(guidance: Guidance, name: str) -> None:
    compile_schema(guidance, LARGE[name])


# The process that tries grammars.


def trial_process(guidance: Guidance) -> subprocess.Popen[bytes]:
    process = guidance._trials._process
    assert process is not None
    return process


def test_a_process_that_is_killed_is_replaced(guidance: Guidance) -> None:
    compile_schema(guidance, {"const": "before"})
    process = trial_process(guidance)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    compile_schema(guidance, {"const": "after"})
    assert trial_process(guidance).pid != process.pid


def test_its_process_ends_with_it(tokenizer: Any) -> None:
    one = Guidance(tokenizer)
    compile_schema(one, {"const": 1})
    process = trial_process(one)
    assert process.poll() is None
    del one
    gc.collect()
    assert process.returncode is not None


def test_a_grammar_is_compiled_once_while_it_is_used(tokenizer: Any) -> None:
    one = Guidance(tokenizer)
    often = json_grammar('{"const": "often"}')
    one.compile(often)
    compiled = one._compiled[often]
    for number in range(2 * MAX_COMPILED):
        one.compile(json_grammar(json.dumps({"const": number})))
        one.start(often)
    assert one._compiled[often] is compiled
    assert len(one._compiled) == MAX_COMPILED


# Guides.


def test_a_guide_says_when_it_is_complete(guidance: Guidance, tokenizer: Any) -> None:
    guide = guidance.start(json_grammar('{"const": [1]}'))
    tokens = tokenizer.encode("[1]")
    assert [guide.advance(token) for token in tokens] == [False, False, True]
    assert allowed(guide) == {END}


def test_json_is_laid_out_as_models_have_seen_it(guidance: Guidance, tokenizer: Any) -> None:
    value = {"a": [1, {"b": None}], "c": ""}
    guide = guidance.start(json_grammar(json.dumps({"const": value})))
    assert [guide.advance(token) for token in tokenizer.encode(json.dumps(value))][-1]


def test_a_forbidden_token_is_an_error(guidance: Guidance) -> None:
    guide = guidance.start(json_grammar('{"type": "boolean"}'))
    with pytest.raises(InvalidRequestError, match="cannot follow its grammar any") as caught:
        guide.advance(END)
    assert "\n" not in str(caught.value)
    assert allowed(guide) == {END}  # which is an error again
    with pytest.raises(EngineError):
        guide.advance(END)


def test_guides_of_one_grammar_know_nothing_of_each_other(
    guidance: Guidance, tokenizer: Any
) -> None:
    grammar = json_grammar('{"enum": ["ab", "cd"]}')
    first, second = guidance.start(grammar), guidance.start(grammar)
    for token in tokenizer.encode('"a'):
        first.advance(token)
    assert allowed(first) == set(tokenizer.encode("b"))
    assert allowed(second) == set(tokenizer.encode('"'))


@given(
    st.lists(st.sampled_from(["free", "object", "boolean"]), min_size=1, max_size=6),
    st.integers(1, 400),
)
def test_each_row_has_its_own_mask(guidance: Guidance, rows: list[str], size: int) -> None:
    grammars = {name: json_grammar(json.dumps({"type": name})) for name in ("object", "boolean")}
    if rows.count("free") == len(rows):
        rows = [*rows, "object"]
    guides = [None if row == "free" else guidance.start(grammars[row]) for row in rows]
    found = allowed_tokens(guides, size)
    assert found.shape == (len(rows), size)
    assert found.dtype == np.bool_
    source = guidance._source
    first = {"object": source.encode("{"), "boolean": [*source.encode("t"), *source.encode("f")]}
    for row, mask in zip(rows, found, strict=True):
        expected = range(size) if row == "free" else [one for one in first[row] if one < size]
        assert set(np.flatnonzero(mask)) == set(expected)


def test_every_end_token_ends_an_answer(tokenizer: Any) -> None:
    class WithTwoEnds:
        eos_token_ids = frozenset({END, END - 1})
        _tokenizer = tokenizer._tokenizer

    guide = Guidance(WithTwoEnds()).start(json_grammar('{"type": "integer"}'))
    guide.advance(tokenizer.encode("7")[0])
    assert allowed(guide) >= {END, END - 1}
    assert guide.advance(END - 1)


def test_an_end_token_that_is_text_ends_nothing_too_early(tokenizer: Any) -> None:
    (letter,) = tokenizer.encode("e")

    class EndsWithALetter:
        eos_token_ids = frozenset({letter})
        _tokenizer = tokenizer._tokenizer

    guide = Guidance(EndsWithALetter()).start(json_grammar('{"type": "string", "maxLength": 9}'))
    for token in tokenizer.encode('"ab'):
        assert letter not in allowed(guide)
        guide.advance(token)
    assert set(tokenizer.encode(string.ascii_lowercase)) - {letter} <= allowed(guide)
    guide.advance(tokenizer.encode('"')[0])
    assert allowed(guide) == {letter}


# Tokenizers.


def test_a_sentencepiece_tokenizer_is_read_as_text_is(tmp_path: Path) -> None:
    source = sentencepiece(tmp_path, ["▁", "▁▁", "a", "▁a", "ü", '",', "<", "日本"])
    guide = Guidance(source).start(json_grammar('{"type": "string", "pattern": "^[a ü日本]+$"}'))

    def names() -> set[str]:
        return set(source.convert_ids_to_tokens(sorted(allowed(guide, 300))))

    def advance(name: str) -> None:
        guide.advance(source.convert_tokens_to_ids(name))

    whole = {"▁", "▁▁", "a", "▁a", "ü", "日本", "<0x20>", "<0x61>", "<0xC3>", "<0xE6>"}
    advance("<0x22>")
    assert names() == whole
    advance("▁a")
    assert names() == whole | {"<0x22>"}
    advance("<0xC3>")
    assert names() == {"<0xBC>"}
    advance("<0xBC>")
    advance("<0x22>")
    assert names() == {"<end>"}


def test_a_tokenizer_of_words_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel(vocab={"<unk>": 0, "<end>": 1, "{": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["<end>"])
    one = Guidance(write(tmp_path, words, "<end>"))
    with pytest.raises(InvalidRequestError, match="response_format cannot be used with this model"):
        one.compile(json_grammar("{}"))


# Lark.


def test_a_lark_grammar_guides_and_a_wrong_one_is_refused(
    guidance: Guidance, tokenizer: Any
) -> None:
    guide = guidance.start(lark_grammar('start: "<a>" /[0-9]{2}/ "</a>"'))
    assert [guide.advance(token) for token in tokenizer.encode("<a>42</a>")][-2:] == [False, True]
    with pytest.raises(InvalidRequestError, match="^tools cannot be used: ") as caught:
        guidance.compile(lark_grammar('start: "a" missing'), "tools")
    assert caught.value.field == "tools"
