"""Log-probabilities as OpenAI's API tells them: in two forms, one for each kind of completion.

A token is its text; one that is a part of a character is written byte by byte, `\\xe2\\x82`.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mlops.engine import TokenLogprobs

LOWEST = -9999.0
"""Stands for a log-probability that JSON cannot say, as in OpenAI's answers."""

TokenBytes = Callable[[Sequence[int]], Sequence[bytes]]
"""Each token's own bytes; `TextRunner.token_bytes`."""


class CompletionLogprobs:
    """The form of `/v1/completions`, for one choice: call it with its tokens in their order."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, entries: Iterable[Any], text: str) -> dict[str, Any]:
        """Tell of the next tokens.

        Args:
            entries: `TokenLogprobs`, or the like as a mapping.
            text: what came with them.
        """
        told = [_as_entry(entry) for entry in entries]
        known = _bytes_of(told, self._token_bytes)
        offsets = []
        for entry in told:
            offsets.append(self._offset)
            piece = self._decoder.decode(known[entry.token])
            if self._offset == 0 and piece.startswith(" ") and not text.startswith(" "):
                piece = piece[1:]  # a space at the very beginning is left out of texts
            self._offset += len(piece)
        return {
            "tokens": [_text(known[entry.token], "bytes:") for entry in told],
            "token_logprobs": [_finite(entry.logprob) for entry in told],
            "top_logprobs": [
                {
                    _text(known[token], "bytes:"): _finite(logprob)
                    for token, logprob in (*entry.top, (entry.token, entry.logprob))
                }
                for entry in told
            ],
            "text_offset": offsets,
        }


def chat_logprobs(entries: Iterable[Any], token_bytes: TokenBytes) -> dict[str, Any]:
    """The form of `/v1/chat/completions`; `entries` as in `CompletionLogprobs.add`."""
    return {"content": list(chat_content(entries, token_bytes)), "refusal": None}


def chat_content(entries: Iterable[Any], token_bytes: TokenBytes) -> Iterator[dict[str, Any]]:
    """Each token of it in turn: all of them at once may be a million objects."""
    told = [_as_entry(entry) for entry in entries]
    known = _bytes_of(told, token_bytes)

    def one(token: int, logprob: float) -> dict[str, Any]:
        raw = known[token]
        return {"token": _text(raw), "logprob": _finite(logprob), "bytes": list(raw)}

    for entry in told:
        yield {
            **one(entry.token, entry.logprob),
            "top_logprobs": [one(token, logprob) for token, logprob in entry.top],
        }


def _as_entry(entry: Any) -> TokenLogprobs:
    return TokenLogprobs(**entry) if isinstance(entry, Mapping) else entry


def _bytes_of(entries: Sequence[TokenLogprobs], token_bytes: TokenBytes) -> dict[int, bytes]:
    tokens = list(
        {
            token: None
            for entry in entries
            for token in (entry.token, *(one for one, _ in entry.top))
        }
    )
    return dict(zip(tokens, token_bytes(tokens), strict=True))


def _text(raw: bytes, prefix: str = "") -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    return logprob if LOWEST < logprob < float("inf") else LOWEST  # NaN is in no range
