"""A text runner without a model: it says the pieces that a test gave it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from echo_runner import EchoRunner

from mlops.errors import EngineShutdownError
from mlops.serving.runner.base import Prediction, TextChunk

LONG_S = 30.0
HELLO = (TextChunk(0, "Hel", (1,)), TextChunk(0, "lo", (2,), "length"))


class ScriptedGenerating:
    """One request. It waits at an Event among the pieces until that is set or it is cancelled."""

    def __init__(self, pieces: Sequence[TextChunk | Exception | threading.Event]) -> None:
        self.pieces = pieces
        self.cancelled = threading.Event()
        self.ended = False
        self.num_chunks = 0

    def cancel(self) -> None:
        self.cancelled.set()

    async def begun(self) -> None:
        if self.pieces and isinstance(self.pieces[0], Exception):
            raise self.pieces[0]

    async def chunks(self) -> AsyncIterator[TextChunk]:
        for piece in self.pieces:
            if isinstance(piece, threading.Event):
                while not piece.is_set() and not self.cancelled.is_set():
                    await asyncio.sleep(0.001)
            elif isinstance(piece, Exception):
                raise piece
            else:
                self.num_chunks += 1
                yield piece
        self.ended = True

    async def prediction(self) -> Prediction:
        chunks = [chunk for chunk in self.pieces if isinstance(chunk, TextChunk)]
        if not self.ended:
            chunks = [chunk async for chunk in self.chunks()]
        texts: dict[int, str] = {}
        reasons: dict[int, str | None] = {}
        for chunk in chunks:
            texts[chunk.index] = texts.get(chunk.index, "") + chunk.text
            reasons[chunk.index] = chunk.finish_reason
        num_tokens = sum(len(chunk.tokens) for chunk in chunks)
        several = [
            {
                "index": index,
                "text": texts[index],
                "finish_reason": reasons[index],
                **_further([chunk for chunk in chunks if chunk.index == index]),
            }
            for index in sorted(texts)
        ]
        return {
            "prediction": texts[0],
            "finish_reason": reasons[0],
            "adapter": None,
            **{name: several[0][name] for name in FURTHER if name in several[0]},
            "mlx_optimized": True,
            "model_type": "mlx",
            "usage": {
                "prompt_tokens": 3,
                "completion_tokens": num_tokens,
                "total_tokens": 3 + num_tokens,
                "cached_tokens": 2,
            },
            **({"choices": several} if len(several) > 1 else {}),
        }


FURTHER = ("logprobs", "tool_calls")


def _further(chunks: Sequence[TextChunk]) -> dict[str, Any]:
    logprobs = [asdict(one) for chunk in chunks for one in chunk.logprobs or ()]
    calls = [asdict(one) for chunk in chunks for one in chunk.tool_calls]
    return {name: one for name, one in zip(FURTHER, (logprobs, calls), strict=True) if one}


class ScriptedRunner(EchoRunner):
    """Answers every request with the same pieces, or refuses it with `refusal`."""

    can_generate = True

    def __init__(
        self,
        *pieces: TextChunk | Exception | threading.Event,
        refusal: Exception | None = None,
    ) -> None:
        super().__init__()
        self.pieces = pieces or HELLO
        self.refusal = refusal
        self.words: dict[int, bytes] = {}
        self.asked: list[Mapping[str, Any]] = []
        self.time_left_s: list[float] = []
        self.generatings: list[ScriptedGenerating] = []

    def generate(
        self, input_data: Mapping[str, Any], *, deadline_s: float | None = None
    ) -> ScriptedGenerating:
        if not self.is_loaded:
            raise EngineShutdownError("not loaded")
        if self.refusal:
            raise self.refusal
        assert deadline_s is not None
        self.asked.append(input_data)
        self.time_left_s.append(deadline_s - time.monotonic())
        self.generatings.append(ScriptedGenerating(self.pieces))
        return self.generatings[-1]

    def token_bytes(self, tokens: Sequence[int], adapter: str | None = None) -> list[bytes]:
        return [self.words.get(token, f"<{token}>".encode()) for token in tokens]

    def statistics(self) -> dict[str, Any]:
        return {"running": 2, "waiting": 1, "batch_sizes": {"10": 5, "2": 3}, "steps": 8}
