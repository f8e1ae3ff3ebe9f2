"""Runners that answer at once: what is left is the cost of serving."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from benchmarks.peers import ANSWER, NUM_TOKENS
from mlops.serving.runner.base import Prediction, TextChunk


class NoOpRunner:
    """A custom runner, as a service takes it in `runner_class`."""

    def __init__(self, model_path: str) -> None:
        self.is_loaded = False

    def load_model(self) -> None:
        self.is_loaded = True

    def predict(self, input_data: str | Mapping[str, Any]) -> Prediction:
        return dict(ANSWER)

    def predict_batch(
        self, inputs: Sequence[str | Mapping[str, Any]]
    ) -> list[Prediction | Exception]:
        return [self.predict(one) for one in inputs]

    def get_memory_usage(self) -> dict[str, Any]:
        return {}

    def unload_model(self) -> None:
        self.is_loaded = False


class NoOpTextRunner(NoOpRunner):
    """Says tokens without computing them; each is an event of its own."""

    can_generate = True

    def generate(
        self, input_data: Mapping[str, Any], *, deadline_s: float | None = None
    ) -> NoOpGenerating:
        return NoOpGenerating()

    def statistics(self) -> dict[str, Any]:
        return {}

    def token_bytes(self, token_ids: Sequence[int]) -> list[bytes]:
        return [b" word"] * len(token_ids)


class NoOpGenerating:
    """One request."""

    def cancel(self) -> None:
        pass

    async def begun(self) -> None:
        """At once."""

    async def chunks(self) -> AsyncIterator[TextChunk]:
        for number in range(NUM_TOKENS):
            await asyncio.sleep(0)  # as an engine's step would, the others have their turn
            yield TextChunk(0, " word", (1,), "length" if number == NUM_TOKENS - 1 else None)

    async def prediction(self) -> Prediction:
        usage = {"prompt_tokens": 1, "completion_tokens": NUM_TOKENS, "total_tokens": 1}
        return {**ANSWER, "usage": usage, "finish_reason": "length"}
