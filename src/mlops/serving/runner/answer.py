"""One request under way: its choices, as chunks of text or as the whole prediction."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from mlops import engine
from mlops.errors import EngineError
from mlops.serving.runner.base import Prediction, TextChunk
from mlops.serving.runner.merging import merge

Result = TypeVar("Result")


@dataclass(frozen=True)
class Prepared:
    """A request that the engine has taken.

    Attributes:
        request: what was asked, with its token ids.
        generations: one for each choice.
        make_reader: finds calls of functions in one choice's text; None when none are offered.
    """

    request: engine.GenerationRequest
    generations: list[engine.Generation] = field(default_factory=list)
    make_reader: Callable[[], engine.ToolReader] | None = None

    def cancel(self) -> None:
        """Give all choices up."""
        for generation in self.generations:
            generation.cancel()


class Answer:
    """See `mlops.serving.runner.base.Generating`.

    Args:
        prepared: the request, once its prompt is tokenized and it is submitted.
        to_prediction: makes the answer of the results of all choices.
    """

    def __init__(
        self,
        prepared: Future[Prepared],
        to_prediction: Callable[[Prepared, Sequence[engine.GenerationResult]], Prediction],
    ) -> None:
        self._prepared = prepared
        self._to_prediction = to_prediction

    def cancel(self) -> None:
        """End it at the next step. From any thread, any number of times, also when it is over."""
        if not self._prepared.cancel():
            self._prepared.add_done_callback(_cancel_generations)

    async def begun(self) -> None:
        """Return once the engine has taken it; see `Generating.begun`."""
        await self._wait_until_prepared()

    async def chunks(self) -> AsyncGenerator[TextChunk]:
        """Every piece of text as it comes; see `Generating.chunks`.

        A reader who stops early ends the request.
        """
        try:
            prepared = await self._wait_until_prepared()
            async with contextlib.aclosing(_read(prepared)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except BaseException:
            self.cancel()
            raise

    async def prediction(self) -> Prediction:
        """The whole answer; see `Generating.prediction`."""
        prepared = await self._wait_until_prepared()
        results = [await _wait_for(one.future) for one in prepared.generations]
        if prepared.request.logprobs is None and prepared.make_reader is None:
            return self._to_prediction(prepared, results)
        # Each token, or character, is looked at in Python: beside the event loop.
        return await asyncio.to_thread(self._to_prediction, prepared, results)

    async def _wait_until_prepared(self) -> Prepared:
        try:
            return await _wait_for(self._prepared)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._prepared.cancelled() and not (task and task.cancelling()):
                raise EngineError("the request was given up before it was begun") from None
            raise


async def _read(prepared: Prepared) -> AsyncGenerator[TextChunk]:
    choices = [
        _read_choice(index, generation, prepared.make_reader)
        for index, generation in enumerate(prepared.generations)
    ]
    reading = choices[0] if len(choices) == 1 else merge(choices)
    async with contextlib.aclosing(reading) as chunks:
        async for chunk in chunks:
            yield chunk


async def _read_choice(
    index: int, generation: engine.Generation, make_reader: Callable[[], engine.ToolReader] | None
) -> AsyncGenerator[TextChunk]:
    reader = make_reader() if make_reader else None
    async with contextlib.aclosing(generation.events()) as events:
        async for event in events:
            yield _to_chunk(index, event, reader)


async def _wait_for(future: Future[Result]) -> Result:
    """Wait for a future that others wait for too: to be cancelled here does not cancel it."""
    return await asyncio.shield(asyncio.wrap_future(future))


def _cancel_generations(prepared: Future[Prepared]) -> None:
    if not prepared.cancelled() and prepared.exception() is None:
        prepared.result().cancel()


@dataclass(frozen=True)
class Answered:
    """What one choice says in the end.

    Attributes:
        text: without the calls.
        finish_reason: `tool_calls` when the model was done and has called functions.
    """

    text: str
    tool_calls: tuple[engine.ToolCall, ...]
    finish_reason: str


def read_result(prepared: Prepared, result: engine.GenerationResult) -> Answered:
    """Take the calls of functions out of a whole answer."""
    if prepared.make_reader is None:
        return Answered(result.text, (), result.finish_reason)
    reader = prepared.make_reader()
    said = reader.add(result.text) + reader.finish(was_cut=result.finish_reason != "stop")
    return Answered(said.text, said.calls, _to_reason(reader, result.finish_reason))


def _to_chunk(
    index: int, event: engine.GenerationEvent, reader: engine.ToolReader | None
) -> TextChunk:
    logprobs, reason = event.logprobs or None, event.finish_reason
    if reader is None:
        return TextChunk(index, event.text, event.tokens, reason, logprobs)
    said = reader.add(event.text)
    if reason is not None:
        said += reader.finish(was_cut=reason != "stop")
    told = reason and _to_reason(reader, reason)
    return TextChunk(index, said.text, event.tokens, told, logprobs, said.calls)


def _to_reason(reader: engine.ToolReader, reason: str) -> str:
    return "tool_calls" if reason == "stop" and reader.num_calls else reason
