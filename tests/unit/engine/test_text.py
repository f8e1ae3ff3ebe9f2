"""Text that is given out while it is generated, with the tokenizers that mlx-lm reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

import mlops.demo
import tiny_models
from mlops.engine.text import MAX_UNREAD_TOKENS, TextBuilder, token_bytes

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
SPM_DECODERS = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
DECODERS = {
    "spm": decoders.Sequence([*SPM_DECODERS, decoders.Strip(" ", 1, 0)]),
    "spm without a trimmed space": decoders.Sequence(SPM_DECODERS),
    # These two are none of those that mlx-lm knows.
    "like spm": decoders.Sequence([*SPM_DECODERS, decoders.Strip(" ", 1, 0), decoders.Fuse()]),
    "metaspace": decoders.Metaspace(),
}
WORDS = ["▁", "▁▁▁▁", "a", "b", "ab", "▁a", "▁bab", "\n", ".", "é", "你", "👩‍👩‍👦", "e\u0301"]


def load(folder: Path) -> Any:
    from mlx_lm.tokenizer_utils import load as load_tokenizer

    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One token per byte."""
    return load(tiny_models.write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module", params=list(DECODERS))
def sentencepiece(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Words and a token per byte."""
    folder = tmp_path_factory.mktemp("tokenizer")
    names = ["<end>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = DECODERS[request.param]
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load(folder)


def bytes_to_tokens(tokenizer: Any, data: bytes) -> list[int]:
    """Ids of a byte-level tokenizer; the characters are in the order of GPT-2's table."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    names = [chr(b) if b in printable else chr(0x100 + others.index(b)) for b in data]
    return [tokenizer.convert_tokens_to_ids(name) for name in names]


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the text ends: at the stop text that is complete first, and there the longest."""
    for end in range(len(text) + 1):
        if lengths := [len(stop) for stop in stops if text[:end].endswith(stop)]:
            return end - max(lengths)
    return None


def certain(text: str, stops: Sequence[str]) -> str:
    """What may be sent of a text so far: all before the longest beginning of a stop text."""
    cut = first_stop(text, stops)
    if cut is not None:
        return text[:cut]
    beginnings = {stop[:length] for stop in stops for length in range(1, len(stop))}
    return text[: len(text) - max((len(b) for b in beginnings if text.endswith(b)), default=0)]


def build(tokenizer: Any, tokens: Sequence[int], stops: Sequence[str] = ()) -> str:
    builder = TextBuilder(tokenizer.detokenizer, stops)
    pieces = [builder.add(token) for token in tokens]
    pieces.append(builder.finish())
    assert builder.finish() == ""
    assert builder.text == "".join(pieces)
    return builder.text


@pytest.fixture(scope="module")
def syllables(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A token for every text of one to three of the letters a, b and é."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = ["a", "b", "Ã©"]
    names = [*letters, *(x + y for x in letters for y in letters)]
    names += [x + y for x in names[3:] for y in letters]
    tokenizer = Tokenizer(
        models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[])
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load(folder)


@given(
    tokens=st.lists(st.integers(0, 38), max_size=12),
    stops=st.lists(st.text("abé", min_size=1, max_size=6), max_size=4),
)
def test_given_out_as_soon_as_no_stop_text_can_begin_in_it(
    syllables: Any, tokens: list[int], stops: list[str]
) -> None:
    builder = TextBuilder(syllables.detokenizer, stops)
    text = given_out = ""
    for token in tokens:
        text += syllables.decode([token])
        given_out += builder.add(token)
        assert given_out == certain(text, stops)
        assert builder.has_stopped == any(stop in text for stop in stops)
    given_out += builder.finish()
    cut = first_stop(text, stops)
    assert given_out == builder.text == (text if cut is None else text[:cut])


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        ([], "one END", "one END"),
        (["END"], "one END two", "one "),
        (["END"], "one EN", "one EN"),
        (["b", "ab"], "xab", "x"),
        (["ab", "b"], "xab", "x"),
        (["abcd", "bc"], "xabcd", "xa"),
        (["\n\n"], "a\n\nb", "a"),
        (["é"], "café au lait", "caf"),
        (["aab"], "aaab", "a"),
        (["abcabd"], "abcabcabd!", "abc"),
        (["👍"], "ok 👍", "ok "),
    ],
)
def test_text_ends_before_the_first_stop_text(
    byte_level: Any, stops: list[str], text: str, expected: str
) -> None:
    assert build(byte_level, bytes_to_tokens(byte_level, text.encode()), stops) == expected


@given(text=st.text())
@example(text="👩‍👩‍👦 e\u0301 שלום\0 \n    x")
def test_every_piece_is_whole_characters_and_comes_at_once(byte_level: Any, text: str) -> None:
    builder = TextBuilder(byte_level.detokenizer, ())
    text = text.replace(REPLACEMENT, "") + "."
    pieces = []
    for character in text:
        *first, last = bytes_to_tokens(byte_level, character.encode())
        assert [builder.add(token) for token in first] == [""] * len(first)
        pieces.append(builder.add(last))
    # mlx-lm leaves out a space at the beginning.
    assert pieces == ["", *text[1:]] if text.startswith(" ") else list(text)
    assert builder.finish() == ""


@given(data=st.binary() | st.lists(st.sampled_from([b"\xe4", b"\xbd\xa0", b"a", b"\x80"])))
@example(data=b"\x80" * 50 + b"a" + b"\x80" * 50)
@example(data="你".encode()[:2])
def test_broken_characters_are_text_only_when_more_follows(
    byte_level: Any, data: bytes | list[bytes]
) -> None:
    data = data if isinstance(data, bytes) else b"".join(data)
    expected = data.decode(errors="replace").rstrip(REPLACEMENT).removeprefix(" ")
    assert build(byte_level, bytes_to_tokens(byte_level, data)) == expected


@given(words=st.lists(st.sampled_from(WORDS) | st.sampled_from(["", *"é你😀 \n"]), max_size=40))
@example(words=["a", "", "▁a"])
@example(words=["a", "\n", "▁▁▁▁", "b"])
@example(words=["▁", "▁a"])
@example(words=["▁"] * 40 + ["a"])
def test_any_tokenizer_gives_what_it_decodes_at_once(sentencepiece: Any, words: list[str]) -> None:
    """A word is one token, or one per byte; "" is an id without a token."""
    tokens = []
    for word in words:
        token = sentencepiece.get_vocab().get(word)
        of_bytes = [sentencepiece.get_vocab()[f"<0x{byte:02X}>"] for byte in word.encode()]
        tokens += [token] if token is not None else of_bytes or [10**6]
    assert build(sentencepiece, tokens) == sentencepiece.decode(tokens)


@given(tokens=st.lists(st.integers(1, 256), max_size=60))
def test_bytes_that_are_no_characters_end_in_text(sentencepiece: Any, tokens: list[int]) -> None:
    text = build(sentencepiece, tokens)
    assert not text.endswith(REPLACEMENT)


def test_a_trained_tokenizer(byte_level: Any) -> None:
    tokenizer = load(Path(mlops.demo.__file__).parent / "base_model")
    text = "The café's 3 “quoted” words —\n\n    indented, 你好 👍🏽.<|end|>" * 20
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert len(tokens) < len(text)
    assert build(tokenizer, tokens) == text
    assert build(tokenizer, tokens, ["👍🏽.", "never"]) == text[: text.index("👍🏽.")]


def test_ids_without_a_token_are_no_text(byte_level: Any) -> None:
    tokens = bytes_to_tokens(byte_level, b"ab")
    assert build(byte_level, [tokens[0], 10**6, tokens[1]]) == "ab"


def test_every_token_of_sentencepiece_has_bytes_of_its_own(sentencepiece: Any) -> None:
    vocabulary = sentencepiece.get_vocab()
    tokens = [vocabulary[word] for word in (*WORDS, "<end>", "<0xE9>", "<0x20>")]
    expected = [word.replace("▁", " ").encode() for word in WORDS]
    assert token_bytes(sentencepiece, tokens) == [*expected, b"<end>", b"\xe9", b" "]
    assert token_bytes(sentencepiece, [10**6]) == [b""]


def test_every_token_of_bytes_has_its_byte(byte_level: Any) -> None:
    tokens = bytes_to_tokens(byte_level, bytes(range(256)))
    assert token_bytes(byte_level, tokens) == [bytes([byte]) for byte in range(256)]
    end = byte_level.eos_token_id
    assert token_bytes(byte_level, [end, 10**6]) == [b"<|end|>", b""]


class Recording:
    """A tokenizer that remembers how many tokens it decoded at once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.most = 0

    def encode(self, text: str, **options: Any) -> Any:
        return self.tokenizer.encode(text, **options)

    def decode(self, tokens: list[int]) -> Any:
        self.most = max(self.most, len(tokens))
        return self.tokenizer.decode(tokens)


@pytest.mark.parametrize("data", [b"a" * 500, b"\x80" * 500, b" " * 500])
def test_a_token_costs_the_same_however_long_the_line_is(byte_level: Any, data: bytes) -> None:
    from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer

    recording = Recording(byte_level)
    builder = TextBuilder(NaiveStreamingDetokenizer(recording), ())
    for token in bytes_to_tokens(byte_level, data):
        builder.add(token)
    builder.finish()
    assert builder.text == data.decode(errors="replace").rstrip(REPLACEMENT)
    assert recording.most <= 2 * MAX_UNREAD_TOKENS


def test_after_the_stop_text_nothing_is_given_out(byte_level: Any) -> None:
    builder = TextBuilder(byte_level.detokenizer, ["b"])
    a, b = bytes_to_tokens(byte_level, b"ab")
    assert [builder.add(token) for token in (a, b, a)] == ["a", "", ""]
    assert (builder.has_stopped, builder.finish(), builder.text) == (True, "", "a")
