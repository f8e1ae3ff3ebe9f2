"""How many tokens a text has at least, told without tokenizing it.

A megabyte takes a tokenizer a second. A text that cannot fit into a model's context is refused
before, by a bound that no text which fits can exceed:

    A token of n bytes covers n bytes of the text. So each byte of the text costs at least 1/n
    token, where n is the length of the longest token that the byte is in.

That holds as long as every byte of the text ends up in some token. `_Reader` looks for all that may
be otherwise in a tokenizer; for one that it does not know, there is no bound, and the text is
tokenized. (WordPiece, for instance, makes one token of a word of any length.)
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from mlops.engine.text import SPM_SPACE, to_bytes_bpe

if TYPE_CHECKING:
    from numpy.typing import NDArray

PIECE_BYTES = 1024 * 1024
ROUNDING = 1e-9
UNICODE_FORMS = ("NFC", "NFKC")
KEEPING = ("ByteLevel", "Digits", "Metaspace", "Punctuation", "Split")
"""Pre-tokenizers that drop nothing, unless their behavior is to remove what they find."""


class TokenBound:
    """The bound of one tokenizer. Any thread may ask.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`; read once, which takes a second when the vocabulary
            is large.

    Attributes:
        is_known: whether there is one; else it is 0.
    """

    def __init__(self, tokenizer: Any) -> None:
        reader = _Reader(tokenizer)
        self.is_known = reader.is_known
        self._composes = reader.composes
        self._weights = _weights(reader) if self.is_known else np.zeros(256)

    def fewest_tokens(self, text: str) -> int:
        """No tokenization of the text, special tokens or not, has fewer tokens."""
        if not self.is_known:
            return 0
        total, data = 0.0, memoryview(text.encode())
        for start in range(0, len(data), PIECE_BYTES):
            piece = np.frombuffer(data[start : start + PIECE_BYTES + 1], np.uint8)
            counted = piece[:PIECE_BYTES]
            if self._composes:
                counted = counted[_is_kept(piece)[: len(counted)]]
            total += float(np.bincount(counted, minlength=256) @ self._weights)
        return math.ceil(total * (1 - ROUNDING))


def _is_kept(data: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which bytes Unicode's normal forms leave as they are: ASCII with no mark that may join it."""
    is_ascii = data < 0x80
    is_kept = is_ascii.copy()
    is_kept[:-1] &= is_ascii[1:]
    return is_kept


def _weights(reader: _Reader) -> NDArray[np.float64]:
    """The least share of a token that each of the 256 bytes costs."""
    longest = [1] * 256  # one that is in no longer token is one by itself
    for covered in reader.tokens():
        length = len(covered)
        for byte in set(covered):
            longest[byte] = max(longest[byte], length)
    # With byte fallback a space is written as another character.
    longest[0x20] = max(longest[0x20], *(longest[byte] for byte in SPM_SPACE))
    weights = 1 / np.array(longest, np.float64)
    weights[list(reader.dropped_bytes())] = 0
    return weights


class _Reader:
    """What a tokenizer does to bytes.

    Attributes:
        composes: it brings a text into one of Unicode's composed forms first.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.composes = False
        self._wrapped = getattr(tokenizer, "_tokenizer", None)
        self._backend: Any = getattr(self._wrapped, "backend_tokenizer", None)
        self.is_known = (
            self._backend is not None
            and self._encodes_unchanged()
            and all(self._knows_normalizer(one) for one in _parts(self._backend.normalizer))
            and all(_drops_nothing(one) for one in _parts(self._backend.pre_tokenizer))
            and self._has_every_byte()
        )

    def tokens(self) -> Iterable[bytes]:
        """What each token covers of a text, at most."""
        to_bytes = to_bytes_bpe if self._is_byte_level else str.encode
        for token in self._backend.get_vocab(with_added_tokens=False):
            yield to_bytes(token)
        normalizer = self._backend.normalizer
        for added in self._added:
            yield added.content.encode()
            if normalizer is not None:  # which a text may be compared with
                yield normalizer.normalize_str(added.content).encode()

    def dropped_bytes(self) -> set[int]:
        """Bytes of white space, where a token takes all that is beside it."""
        if not any(added.lstrip or added.rstrip for added in self._added):
            return set()
        spaces = (chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace())
        return {byte for space in spaces for byte in space.encode()}

    @property
    def _added(self) -> list[Any]:
        return list(self._backend.get_added_tokens_decoder().values())

    @property
    def _is_byte_level(self) -> bool:
        return any(one["type"] == "ByteLevel" for one in _parts(self._backend.pre_tokenizer))

    def _encodes_unchanged(self) -> bool:
        """False for a class, such as one of mlx-lm's, that changes a text before."""
        from transformers import PreTrainedTokenizerFast

        kind = type(self._wrapped)
        return all(
            getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name)
            for name in ("encode", "_encode_plus", "__call__")
        )

    def _knows_normalizer(self, part: dict[str, Any]) -> bool:
        if part["type"] in UNICODE_FORMS:
            self.composes = True
            return True
        if part["type"] == "Replace":
            return bool(
                part["pattern"] == {"String": " "} and part["content"] == SPM_SPACE.decode()
            )
        return bool(part["type"] == "Prepend")

    def _has_every_byte(self) -> bool:
        """Whether nothing is unknown to it."""
        from tokenizers.models import BPE

        model, vocabulary = self._backend.model, self._backend.get_vocab(with_added_tokens=False)
        if not isinstance(model, BPE):
            return False
        if self._is_byte_level:
            single = {token for token in vocabulary if len(token) == 1}
            return {to_bytes_bpe(token) for token in single} >= {bytes([n]) for n in range(256)}
        return model.byte_fallback and all(f"<0x{n:02X}>" in vocabulary for n in range(256))


def _parts(component: Any) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the file has it, sequences taken apart."""
    if component is None:
        return []
    parts, found = [json.loads(component.__getstate__())], []
    while parts:
        part = parts.pop()
        if part["type"] == "Sequence":
            parts += part.get("normalizers", part.get("pretokenizers", []))
        else:
            found.append(part)
    return found


def _drops_nothing(part: dict[str, Any]) -> bool:
    if part["type"] == "Metaspace" and part["replacement"] != SPM_SPACE.decode():
        return False
    return part["type"] in KEEPING and part.get("behavior") != "Removed"
