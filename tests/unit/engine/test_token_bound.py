"""The bound that refuses long texts: no text may have fewer tokens than it says."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mlops.engine.token_bound import TokenBound
from tiny_models import write_tokenizer

TRAINED_ON = [
    "the theatre there, the theory    \n\n\n\n of all those        things\t\t\t\t",
    "====================----------------########",
    "élève ÉLÈVE naïve über straße 中文中文中文 한국어 \u1112\u1161\u11ab ﬁnﬁn ＡＢＣ",
    "if (x) { return y; }        if (x) { return y; }",
]
PIECES = [
    *(
        "the",
        "theatre",
        " ",
        "        ",
        "\n\n\n\n",
        "\t",
        "====",
        "e\u0301",
        "é",
        "\u0301\u0316" * 3,
    ),
    *(
        "中文",
        "\u1112\u1161\u11ab",
        "\u212a",
        "\u037e",
        ">\u0338",
        "ﬁ",
        "Ａ",
        "\u3000",
        "\u2003\xa0",
    ),
    *("<|end|>", "<|eats|>", "<|e", "▁", "▁▁▁▁", "<0x41>", "🙂", "\x00", "ﷺ", "a" * 40, "x\x85"),
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=40).map("".join)


def byte_level(normalizer: Any = None, *, eats: bool = False, split: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    tokenizer.pre_tokenizer = by_bytes
    if split:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"), by_bytes]
        )
    tokenizer.post_processor = processors.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TRAINED_ON, trainer)
    tokenizer.add_special_tokens(["<|end|>", AddedToken("<|eats|>", lstrip=eats, rstrip=eats)])
    return tokenizer


def byte_fallback(*, eats: bool = False) -> Tokenizer:
    """As Llama 2's and Gemma's: spaces are written as another character."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        min_frequency=1,
        show_progress=False,
        special_tokens=["<unk>", *(f"<0x{n:02X}>" for n in range(256))],
    )
    tokenizer.train_from_iterator([text.replace(" ", "▁") for text in TRAINED_ON], trainer)
    whole = json.loads(tokenizer.to_str())
    whole["added_tokens"] = []  # the bytes are no special tokens
    tokenizer = Tokenizer.from_str(json.dumps(whole))
    tokenizer.add_special_tokens([AddedToken("<|eats|>", rstrip=eats)])
    return tokenizer


KNOWN: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "split": lambda: byte_level(split=True),
    "NFC": lambda: byte_level(normalizers.NFC()),
    "NFKC": lambda: byte_level(normalizers.NFKC()),
    "tokens that eat spaces": lambda: byte_level(eats=True),
    "NFC and tokens that eat spaces": lambda: byte_level(normalizers.NFC(), eats=True),
    "byte fallback": byte_fallback,
    "byte fallback and tokens that eat spaces": lambda: byte_fallback(eats=True),
}


def wrapped(tokenizer: Tokenizer) -> Any:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    return SimpleNamespace(_tokenizer=fast, encode=fast.encode)


@functools.cache
def made(name: str) -> tuple[Any, TokenBound]:
    tokenizer = wrapped(KNOWN[name]())
    return tokenizer, TokenBound(tokenizer)


@pytest.mark.parametrize("name", KNOWN)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS, times=st.sampled_from([1, 1, 7]))
def test_no_text_has_fewer_tokens(name: str, text: str, times: int) -> None:
    tokenizer, bound = made(name)
    fewest = bound.fewest_tokens(text * times)
    assert fewest <= len(tokenizer.encode(text * times, add_special_tokens=False))


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize(
    "text",
    ["<|eats|>" + " \u3000\n\x85" * 5000, "        " * 500, "▁" * 5000, "e\u0301" * 5000],
    ids=["eaten spaces", "spaces", "written spaces", "accents"],
)
def test_no_text_of_one_kind_has_fewer_tokens(name: str, text: str) -> None:
    tokenizer, bound = made(name)
    assert bound.fewest_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("name", KNOWN)
def test_a_long_text_has_many(name: str) -> None:
    _, bound = made(name)
    assert bound.is_known
    assert bound.fewest_tokens("there is no room for such a text, " * 100_000) > 50_000


def test_a_text_longer_than_what_is_counted_at_once_is_counted_whole() -> None:
    _, bound = made("NFC")
    one = bound.fewest_tokens("ab" * 2**19)
    assert one > 0
    assert abs(bound.fewest_tokens("ab" * 2**21) - 4 * one) <= 4


def write_piece(vocabulary: dict[str, int], **options: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", **options))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def without_a_byte() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:-1]
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def with_normalizer(normalizer: Any) -> Tokenizer:
    return byte_level(normalizer)


UNKNOWN: dict[str, Callable[[], Tokenizer]] = {
    "a word of any length is one token": lambda: write_piece({"[UNK]": 0, "a": 1}),
    "a byte has no token": without_a_byte,
    "spaces are cut off": lambda: with_normalizer(normalizers.Strip()),
    "accents are left out": lambda: with_normalizer(normalizers.StripAccents()),
    "something is left out": lambda: with_normalizer(normalizers.Replace(Regex("a+"), "")),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_may_shorten_a_text_has_no_bound(name: str) -> None:
    bound = TokenBound(wrapped(UNKNOWN[name]()))
    assert not bound.is_known
    assert bound.fewest_tokens("a" * 1000) == 0


def test_pre_tokenizers_that_remove_have_no_bound() -> None:
    tokenizer = byte_level()
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for removing in (
        pre_tokenizers.Split(Regex("a+"), "removed"),
        pre_tokenizers.Punctuation("removed"),
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.CharDelimiterSplit("a"),
    ):
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([removing, by_bytes])
        assert not TokenBound(wrapped(tokenizer)).is_known


def test_a_class_that_changes_the_text_has_no_bound() -> None:
    class Shortening(PreTrainedTokenizerFast):
        def encode(self, text: str, **options: Any) -> Any:
            return super().encode(text[:1], **options)

    tokenizer = SimpleNamespace(_tokenizer=Shortening(tokenizer_object=byte_level()))
    assert not TokenBound(tokenizer).is_known
    assert not TokenBound(SimpleNamespace()).is_known


def test_a_model_folders_tokenizer_has_a_bound(tmp_path: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path))
    assert TokenBound(SimpleNamespace(_tokenizer=loaded)).fewest_tokens("wxyz") == 4
