"""From tokens to text that may be sent at once, up to the first stop text.

    token -> bytes or window of tokens -> whole characters -> stop texts -> text

Stop texts are matched on text and not on token ids: a tokenizer may split them in many ways.

mlx-lm's streaming detokenizers tell which kind of tokenizer it is and bring its vocabulary; their
own decoding is not used. It is quadratic in the length of a line or of a run of spaces, may lose
the indentation after a line break, and reads the byte 0 as "Ā".
"""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
SPM_SPACE = "\N{LOWER ONE EIGHTH BLOCK}".encode()

MAX_UNREAD_TOKENS = 16
"""Tokens that are decoded together at most: a character takes four, unless it is none."""


class TextBuilder:
    """The text of one generation. Use it in one thread.

    What `add` and `finish` return is, put together, the text before the first stop text; the first
    is the one that is complete first, and of those, the one that begins first. Given out is
    only what stays: held back are bytes of an incomplete character, what may be the beginning of a
    stop text (fewer characters than the longest has), and broken characters at the end, which are
    no text unless more follows.

    A space at the very beginning is left out where mlx-lm does so.
    """

    def __init__(self, detokenizer: Any, stops: Sequence[str]) -> None:
        """Start a text.

        Args:
            detokenizer: `tokenizer.detokenizer` of mlx-lm's tokenizer; it is only read.
            stops: texts, none of them empty.
        """
        self.has_stopped = False
        """A stop text is complete: it and what follows are not in the text."""
        self._decoder = _make_decoder(detokenizer)
        self._stops = [TextMatcher(stop) for stop in stops]
        self._given: list[str] = []
        self._held = ""
        self._num_broken = 0

    @property
    def text(self) -> str:
        """All that was given out."""
        return "".join(self._given)

    def add(self, token: int) -> str:
        """Take the next token; returns the text that is now certain, often ""."""
        if self.has_stopped:
            return ""
        return self._give(self._hold_back(self._take_whole(self._decoder.add(token))))

    def finish(self) -> str:
        """Return what was held back and is text, at the end of the generation."""
        if self.has_stopped:
            return ""
        certain = self._hold_back(self._take_whole(self._decoder.finish()))
        if not self.has_stopped:
            certain += self._held
        self._held, self._num_broken = "", 0
        return self._give(certain)

    def _give(self, text: str) -> str:
        if text:
            self._given.append(text)
        return text

    def _take_whole(self, segment: str) -> str:
        """Keep broken characters until others follow; only counted, for there may be many."""
        whole = segment.rstrip(REPLACEMENT)
        num_broken = len(segment) - len(whole)
        if not whole:
            self._num_broken += num_broken
            return ""
        whole = REPLACEMENT * self._num_broken + whole
        self._num_broken = num_broken
        return whole

    def _hold_back(self, segment: str) -> str:
        """Append to the held text; returns the part of it that no stop text can begin in."""
        if not self._stops:
            return segment
        pending = self._held + segment
        for end, character in enumerate(segment, len(self._held) + 1):
            longest = 0
            for stop in self._stops:
                if stop.add(character):
                    longest = max(longest, len(stop.text))
            if longest:
                self.has_stopped = True
                return pending[: end - longest]
        num_certain = len(pending) - max(stop.num_matched for stop in self._stops)
        self._held = pending[num_certain:]
        return pending[:num_certain]


def token_bytes(tokenizer: Any, tokens: Iterable[int]) -> list[bytes]:
    """Each token's own bytes, which may be a part of a character.

    A special token is its text; an id that the tokenizer has no token for is no bytes.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`; it is only read.
        tokens: ids, not negative.
    """
    decoder = _make_decoder(tokenizer.detokenizer)
    if isinstance(decoder, _ByteDecoder):
        return [decoder.to_bytes(token) for token in tokens]
    return [_to_bytes_alone(tokenizer, token) for token in tokens]


class TextMatcher:
    """How much of a given text, such as a stop text, the text so far ends with.

    Knuth, Morris, Pratt, "Fast pattern matching in strings" (1977): a constant number of steps per
    character, on average, whatever text and stop text are.
    """

    __slots__ = ("_fallback", "num_matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        # The longest beginning of `text` that each shorter beginning of it ends with.
        self._fallback: list[int] = [0]
        for character in text[1:]:
            self.add(character)
            self._fallback.append(self.num_matched)
        self.num_matched = 0

    def add(self, character: str) -> bool:
        """Take the next character; True when the given text is complete."""
        matched = self.num_matched
        while matched and self.text[matched] != character:
            matched = self._fallback[matched - 1]
        if self.text[matched] == character:
            matched += 1
        self.num_matched = matched
        return matched == len(self.text)


class _Decoder(Protocol):
    """From tokens to text without halves of characters at its end."""

    def add(self, token: int) -> str: ...

    def finish(self) -> str: ...


def _make_decoder(detokenizer: Any) -> _Decoder:
    from mlops.engine.mlx_lm import BPEStreamingDetokenizer, SPMStreamingDetokenizer

    if isinstance(detokenizer, BPEStreamingDetokenizer):
        return _ByteDecoder(detokenizer.tokenmap, to_bytes_bpe, trims_space=True)
    if isinstance(detokenizer, SPMStreamingDetokenizer):
        return _ByteDecoder(detokenizer.tokenmap, _to_bytes_spm, detokenizer.trim_space)
    return _WindowDecoder(detokenizer._tokenizer.decode)


class _ByteDecoder:
    """Tokens that are bytes, whatever stands before them."""

    def __init__(
        self, vocabulary: Sequence[Any], to_bytes: Callable[[Any], bytes], trims_space: bool
    ) -> None:
        self._vocabulary = vocabulary
        self._to_bytes = to_bytes
        self._trims_space = trims_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        text = self._utf8.decode(self.to_bytes(token))
        if text and self._trims_space:
            self._trims_space = False
            return text.removeprefix(" ")
        return text

    def to_bytes(self, token: int) -> bytes:
        # Models have rows for ids that their tokenizer has no token for: they are no text.
        entry = self._vocabulary[token] if token < len(self._vocabulary) else None
        return self._to_bytes(entry) if entry else b""

    def finish(self) -> str:
        return ""  # what is left are bytes of a character that never became one


def to_bytes_bpe(token: str) -> bytes:
    """As tokenizers' decoder ByteLevel: a token with another character stands for itself."""
    table = _bytes_of_characters()
    try:
        return bytes([table[character] for character in token])
    except KeyError:
        return token.encode()


def _to_bytes_spm(token: bytes) -> bytes:
    return token.replace(SPM_SPACE, b" ")


def _to_bytes_alone(tokenizer: Any, token: int) -> bytes:
    """Bytes of a token whose text depends on those before, as it is written in the vocabulary."""
    if token >= len(tokenizer):
        return b""
    entry = tokenizer.convert_ids_to_tokens(token)
    if entry is None:
        return b""
    if byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", entry):
        return bytes.fromhex(byte[1])
    if SPM_SPACE in (raw := entry.encode()):
        return _to_bytes_spm(raw)
    text: str = tokenizer.decode([token])
    return text.encode()


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    As GPT-2's `bytes_to_unicode`: printable characters of Latin-1 stand for themselves, those from
    U+0100 on for the other bytes in their order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + number): byte for number, byte in enumerate(others)
    }


class _WindowDecoder:
    """Tokens whose text depends on those before: some are decoded again with each new one."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._context_text = ""
        self._unread: list[int] = []

    def add(self, token: int) -> str:
        self._unread.append(token)
        text = self._decode_unread()
        is_incomplete = not text or text.endswith(REPLACEMENT)
        if is_incomplete and len(self._unread) < MAX_UNREAD_TOKENS:
            return ""
        self._context, self._unread = self._unread, []
        self._context_text = self._decode(self._context)
        return text

    def finish(self) -> str:
        text = self._decode_unread() if self._unread else ""
        self._unread = []
        return text

    def _decode_unread(self) -> str:
        return self._decode(self._context + self._unread)[len(self._context_text) :]
