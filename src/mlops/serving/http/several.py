"""Several requests that are answered as one: `/v1/completions` with a list of prompts.

Each is a generation of its own. When one is refused or fails, all of them end.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlops.counts import count
from mlops.errors import InvalidRequestError
from mlops.serving.runner.base import Generating, Prediction, TextChunk, TextRunner
from mlops.serving.runner.merging import merge


class Several:
    """See `mlops.serving.runner.base.Generating`. Choice k of request i has the index i * n + k.

    They begin one after the other, so other clients' prompts are prepared between them.

    Args:
        inputs: requests that differ in their prompts only.

    Raises:
        InvalidRequestError: they are more than the runner ever takes at once.
    """

    def __init__(
        self, runner: TextRunner, inputs: Sequence[Mapping[str, Any]], deadline_s: float
    ) -> None:
        n = inputs[0].get("n", 1)
        limit = getattr(runner, "max_choices", None)  # of a runner that has one
        if limit is not None and len(inputs) * n > limit:
            raise InvalidRequestError(
                f"prompt has {count(len(inputs), 'prompt')}, which with n = {n} are "
                f"{len(inputs) * n} answers; this service takes requests for {limit} at most",
                "prompt",
            )
        self._runner = runner
        self._inputs = list(inputs)
        self._deadline_s = deadline_s
        self._num_choices = n
        self._parts: list[Generating] = []

    def cancel(self) -> None:
        """End all of them."""
        self._inputs = []
        for part in self._parts:
            part.cancel()

    async def begun(self) -> None:
        """Return once all of them are accepted."""
        try:
            while self._inputs:
                one = self._inputs.pop(0)
                part = self._runner.generate(one, deadline_s=self._deadline_s)
                self._parts.append(part)
                await part.begun()
        except BaseException:
            self.cancel()
            raise

    async def chunks(self) -> AsyncGenerator[TextChunk]:
        """The pieces of all of them, each as it comes."""
        # One that is refused is known before anything is sent of the others.
        await self.begun()
        numbered = [
            _numbered(part, number * self._num_choices) for number, part in enumerate(self._parts)
        ]
        try:
            async with contextlib.aclosing(merge(numbered)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            self.cancel()

    async def prediction(self) -> Prediction:
        """All answers as the choices of one; tokens add up."""
        await self.begun()
        try:
            predictions = [await part.prediction() for part in self._parts]
        except BaseException:
            self.cancel()
            raise
        usage = {
            name: sum(one["usage"][name] for one in predictions) for name in predictions[0]["usage"]
        }
        choices = [
            {**choice, "index": number * self._num_choices + choice["index"]}
            for number, prediction in enumerate(predictions)
            for choice in choices_of(prediction)
        ]
        timings = [one["timings"] for one in predictions if "timings" in one]
        whole = {**predictions[0], "usage": usage, "choices": choices}
        if timings:  # the first one's, until the last one's end
            whole["timings"] = {**timings[0], "total_ms": max(one["total_ms"] for one in timings)}
        return whole


def choices_of(prediction: Prediction) -> list[dict[str, Any]]:
    """Every choice of an answer, with `index`, `text` and `finish_reason`."""
    if several := prediction.get("choices"):
        return list(several)
    names = ("finish_reason", "logprobs", "tool_calls")
    of_first = {name: prediction[name] for name in names if name in prediction}
    return [{"index": 0, "text": prediction["prediction"], **of_first}]


async def _numbered(part: Generating, first_index: int) -> AsyncGenerator[TextChunk]:
    """The chunks of one of them, with the indexes that its choices have among all."""
    async with contextlib.aclosing(part.chunks()) as chunks:  # type: ignore[type-var]
        async for chunk in chunks:
            yield replace(chunk, index=first_index + chunk.index)
