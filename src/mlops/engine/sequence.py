"""One generation under way: what was asked, where it stands, and what is told to the client.

    waiting -> prefilling -> running -> finished

A `Generation` is the client's end of it, used from any thread; a `Sequence` is the engine's.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from mlops.engine.guidance import Guide
from mlops.engine.request import GenerationRequest
from mlops.engine.residency import Adapter
from mlops.engine.text import TextBuilder

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of one position, natural logarithm.

    Attributes:
        token: the token that was drawn.
        logprob: the model's own, before temperature, penalties and bias.
        top: the most likely tokens, most likely first: (token, log-probability).
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class GenerationEvent:
    """What came since the last event.

    Attributes:
        text: never part of a character, never part of a stop text.
        tokens: ids, without the end token. Their text may come with a later event.
        finish_reason: set in the last event of a generation.
        result: the whole generation; in the last event.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    result: GenerationResult | None = None


@dataclass(frozen=True)
class GenerationResult:
    """What one request generated.

    Attributes:
        text: without the stop text, never cut inside a character.
        tokens: ids as generated, without the end token.
        finish_reason: `stop` (end token or stop text), `length` (max_tokens) or `cancelled`.
        prompt_tokens: tokens of the prompt; of these `cached_tokens` came from the prefix cache.
        queue_ms: from submission until its prompt was begun.
        first_token_ms: from submission to the first token; 0 when there is none.
        total_ms: from submission to the end.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    queue_ms: float
    first_token_ms: float
    total_ms: float
    logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def completion_tokens(self) -> int:
        """Tokens generated, without the end token."""
        return len(self.tokens)


class Generation:
    """The client's end of one generation. Every method may be called from any thread."""

    def __init__(self) -> None:
        self.is_cancelled = False
        self.is_streamed = False
        """True from when somebody reads `events`; before, none are made."""
        self.future: Future[GenerationResult] = Future()
        """Set once: to the result, or to the exception that ended the generation."""
        self.future.set_running_or_notify_cancel()  # whoever waits for it cannot cancel it
        self._events: deque[GenerationEvent] = deque()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None
        self._wake = threading.Lock()

    def cancel(self) -> None:
        """Give up; the row is free at the engine's next step. Does nothing when it is over."""
        self.is_cancelled = True

    def result(self, timeout_s: float | None = None) -> GenerationResult:
        """Wait for the end.

        Raises:
            EngineError: what ended the generation.
            TimeoutError: it is still under way after `timeout_s`.
        """
        return self.future.result(timeout_s)

    async def events(self) -> AsyncGenerator[GenerationEvent]:
        """What is generated, as it comes; for one reader. A slow reader gets longer events.

        A reader who stops early cancels the generation.

        Raises:
            EngineError: what ended the generation, after the events before it.
        """
        loop = asyncio.get_running_loop()
        self.is_streamed = True
        num_characters = num_tokens = 0
        try:
            while True:
                is_over = self.future.done()  # before the look at the events: the last comes first
                if event := self._take():
                    num_characters += len(event.text)
                    num_tokens += len(event.tokens)
                    yield event
                    if event.finish_reason is not None:
                        return
                elif is_over:  # it ended before anybody read
                    result = self.future.result()
                    yield GenerationEvent(
                        result.text[num_characters:],
                        result.tokens[num_tokens:],
                        result.logprobs[num_tokens:],
                        result.finish_reason,
                        result,
                    )
                    return
                else:
                    await self._wait(loop)
        finally:
            if not self.future.done():
                self.cancel()

    def put(self, event: GenerationEvent) -> None:
        """Add an event; called by the engine, which then calls `wake_readers`."""
        self._events.append(event)

    async def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        waiter: asyncio.Future[None] = loop.create_future()
        with self._wake:
            if self._events or self.future.done():
                return
            self._waiter = (loop, waiter)
        await waiter

    def _take(self) -> GenerationEvent | None:
        """Everything there is, as one event."""
        events = []
        while self._events:
            events.append(self._events.popleft())
        if len(events) < 2:
            return events[0] if events else None
        return GenerationEvent(
            "".join(event.text for event in events),
            tuple(token for event in events for token in event.tokens),
            tuple(one for event in events for one in event.logprobs),
            events[-1].finish_reason,
            events[-1].result,
        )

    def take_waiter(self) -> tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None:
        """The reader that waits, if one does; whoever takes it wakes it."""
        with self._wake:
            waiter, self._waiter = self._waiter, None
        return waiter


def wake_readers(generations: list[Generation]) -> None:
    """Tell each event loop once that its readers can go on."""
    waiters: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for generation in generations:
        if waiter := generation.take_waiter():
            waiters.setdefault(waiter[0], []).append(waiter[1])
    for loop, futures in waiters.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            loop.call_soon_threadsafe(_set_done, futures)


def _set_done(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


@dataclass(eq=False)
class Sequence:
    """The engine's record of one generation.

    Attributes:
        adapter: the generation of the adapter it uses; None is the base model.
        text: turns tokens into text.
        end_tokens: ids that end it.
        guide: what it may draw next; None is anything.
        caches: state of its own while the prompt is computed; None before and after.
        num_prefilled: tokens of the prompt that `caches` hold.
        num_cached: of these, what came from the prefix cache.
        num_drawn: tokens that steps have drawn, known to the host or not yet.
        all_tokens: prompt and drawn tokens that the host knows, the end token included.
        tokens: what was generated, without the end token.
        kept: a copy of its row for the prefix cache, made when it left the batch.
    """

    request: GenerationRequest
    generation: Generation
    adapter: Adapter | None
    text: TextBuilder
    end_tokens: frozenset[int]
    guide: Guide | None = None
    submitted_s: float = field(default_factory=time.monotonic)
    started_s: float | None = None
    first_token_s: float | None = None
    caches: Any = None
    num_prefilled: int = 0
    num_cached: int = 0
    num_drawn: int = 0
    all_tokens: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    kept: Any = None
    _unsent_text: str = ""
    _num_sent: int = 0

    def __post_init__(self) -> None:
        self.all_tokens = list(self.request.prompt)

    @property
    def is_finished(self) -> bool:
        """True once it has a reason or an error; it gets no further tokens."""
        return self.finish_reason is not None or self.error is not None

    @property
    def is_cancelled(self) -> bool:
        """True when the client gave it up."""
        return self.finish_reason == "cancelled"

    @property
    def num_computed(self) -> int:
        """Tokens that its row holds: all but the last one drawn, which has been no input yet."""
        return len(self.request.prompt) + self.num_drawn - 1

    @property
    def adapter_name(self) -> str | None:
        """Name of its adapter; None is the base model."""
        return None if self.adapter is None else self.adapter.name

    @property
    def slot(self) -> int:
        """Where its adapter is; 0 is the base model."""
        return 0 if self.adapter is None else self.adapter.slot or 0

    @property
    def num_to_prefill(self) -> int:
        """Tokens of the prompt that are still to be computed; the last is the first step's."""
        return len(self.request.prompt) - 1 - self.num_prefilled

    @property
    def max_length(self) -> int:
        """Tokens that it holds in the end, at most."""
        return len(self.request.prompt) + self.request.max_tokens

    @property
    def has_drawn_all(self) -> bool:
        """True when its last token has been drawn, known to the host or not yet."""
        return self.num_drawn >= self.request.max_tokens

    def add(self, token: int, logprobs: TokenLogprobs | None = None) -> None:
        """Take the next token; afterwards `is_finished` may be true.

        Raises:
            EngineError: the guide cannot go on.
        """
        if self.first_token_s is None:
            self.first_token_s = time.monotonic()
        self.all_tokens.append(token)
        is_complete = self.guide is not None and self.guide.advance(token)
        if token in self.end_tokens:
            self.finish("stop")
            return
        self.tokens.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        self._unsent_text += self.text.add(token)
        if self.text.has_stopped or is_complete:
            self.finish("stop")
        elif len(self.tokens) >= self.request.max_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """End it, with the text that was held back."""
        self._unsent_text += self.text.finish()
        self.finish_reason = "stop" if self.text.has_stopped else reason

    def fail(self, error: Exception) -> None:
        """End it with an error, unless it has ended."""
        if not self.is_finished:
            self.error = error

    def publish(self) -> None:
        """Give the client what came since the last time; at the end, the result or the error."""
        result = None if self.finish_reason is None else self._to_result()
        if self.generation.is_streamed and (result or self._num_sent < len(self.tokens)):
            first, self._num_sent = self._num_sent, len(self.tokens)
            text, self._unsent_text = self._unsent_text, ""
            self.generation.put(
                GenerationEvent(
                    text,
                    tuple(self.tokens[first:]),
                    tuple(self.logprobs[first:]),
                    self.finish_reason,
                    result,
                )
            )
        if self.error is not None:
            self.generation.future.set_exception(self.error)
        elif result is not None:
            self.generation.future.set_result(result)

    def _to_result(self) -> GenerationResult:
        assert self.finish_reason is not None  # noqa: S101 - `publish` has looked
        now = time.monotonic()

        def since_submission_ms(moment_s: float | None) -> float:
            return 0.0 if moment_s is None else 1000 * (moment_s - self.submitted_s)

        return GenerationResult(
            text=self.text.text,
            tokens=tuple(self.tokens),
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.num_cached,
            queue_ms=since_submission_ms(self.started_s if self.started_s else now),
            first_token_ms=since_submission_ms(self.first_token_s),
            total_ms=since_submission_ms(now),
            logprobs=tuple(self.logprobs),
        )
