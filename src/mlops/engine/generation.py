"""Text generation: one request, or several in one static batch.

    requests -> group by adapter -> apply it -> decode, token by token -> text, stop, finish

Requests for the same adapter share every forward pass where mlx-lm can batch the model's caches.
A row leaves the batch as soon as it is finished, cancelled or out of time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mlops.engine.loading import LoadedModel
from mlops.engine.owner import is_stopping, run_in_owner
from mlops.engine.request import GenerationRequest
from mlops.engine.sampling import make_sampler
from mlops.engine.stops import StopMatcher
from mlops.errors import DeadlineExceededError, EngineError, EngineShutdownError, MLOpsError

if TYPE_CHECKING:
    import mlx.core as mx

logger = logging.getLogger(__name__)

PREFILL_STEP_TOKENS = 512
"""Prompt tokens between two looks at whether anybody still wants the answer."""

PREFILL_ROWS = 8
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class GenerationResult:
    """What one request generated.

    Attributes:
        text: without the stop text, never cut inside a character.
        tokens: ids as generated, without the end token.
        finish_reason: `stop` (end token or stop text), `length` (max_tokens) or `cancelled`.
        first_token_ms: from the start of generation to the first token.
        total_ms: from the start of generation to the last token.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    first_token_ms: float
    total_ms: float

    @property
    def completion_tokens(self) -> int:
        """Tokens generated, without the end token."""
        return len(self.tokens)


@dataclass
class _Sequence:
    """One generation under way."""

    request: GenerationRequest
    detokenizer: Any
    end_tokens: frozenset[int]
    started_s: float
    matcher: StopMatcher = field(init=False)
    tokens: list[int] = field(default_factory=list)
    first_token_s: float | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.matcher = StopMatcher(self.request.stop)

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def add(self, token: int) -> None:
        """Take the next token; afterwards `is_finished` may be true."""
        if self.first_token_s is None:
            self.first_token_s = time.monotonic()
        if token in self.end_tokens:
            self._finish_text()
            self.finish_reason = "stop"
            return
        self.tokens.append(token)
        self.detokenizer.add_token(token)
        if self.matcher.add(self.detokenizer.last_segment):
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.request.max_tokens:
            self._finish_text()
            self.finish_reason = "stop" if self.matcher.has_stopped else "length"

    def look_up(self) -> None:
        """End the sequence when nobody waits for it any more."""
        if self.is_finished:
            return
        if is_stopping():
            self.error = EngineShutdownError("the interpreter is exiting; generation has ended")
        elif self.request.is_cancelled is not None and self.request.is_cancelled():
            self.finish_reason = "cancelled"
        elif self.request.deadline_s is not None and time.monotonic() >= self.request.deadline_s:
            self.error = DeadlineExceededError(
                f"the time for this request is over after {len(self.tokens)} of at most "
                f"{self.request.max_tokens} tokens"
            )

    def to_result(self) -> GenerationResult:
        now = time.monotonic()
        if self.finish_reason is None:
            raise EngineError("generation ended before the request was finished")
        return GenerationResult(
            text=self.matcher.text,
            tokens=tuple(self.tokens),
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.request.prompt),
            first_token_ms=((self.first_token_s or now) - self.started_s) * 1000,
            total_ms=(now - self.started_s) * 1000,
        )

    def _finish_text(self) -> None:
        self.detokenizer.finalize()
        # What is left of a character whose other bytes were not generated is no text.
        self.matcher.add(self.detokenizer.last_segment.rstrip("\N{REPLACEMENT CHARACTER}"))


def generate(
    loaded: LoadedModel, requests: Sequence[GenerationRequest]
) -> list[GenerationResult | Exception]:
    """Answer requests, in their order; each one that fails gets its own exception.

    Exceptions in the list: `AdapterNotFoundError`, `DeadlineExceededError`, `EngineShutdownError`,
    and `EngineError` when the model itself failed.
    """
    return run_in_owner(_generate, loaded, requests)


def _generate(
    loaded: LoadedModel, requests: Sequence[GenerationRequest]
) -> list[GenerationResult | Exception]:
    started_s = time.monotonic()
    end_tokens = frozenset(loaded.tokenizer.eos_token_ids)
    sequences = [
        _Sequence(request, loaded.tokenizer.detokenizer, end_tokens, started_s)
        for request in requests
    ]
    groups: dict[str | None, list[_Sequence]] = {}
    for sequence in sequences:
        groups.setdefault(sequence.request.adapter, []).append(sequence)

    results: dict[int, GenerationResult | Exception] = {}
    for adapter, group in groups.items():
        size = len(group) if loaded.can_batch else 1
        for first in range(0, len(group), size):
            batch = group[first : first + size]
            _run_batch(loaded, adapter, batch)
            for sequence in batch:
                results[id(sequence)] = sequence.error or sequence.to_result()
    return [results[id(sequence)] for sequence in sequences]


def _run_batch(loaded: LoadedModel, adapter: str | None, batch: list[_Sequence]) -> None:
    """Generate until every sequence is finished or has its error."""
    try:
        with loaded.adapters.applied(adapter):
            if len(batch) == 1:
                _decode_one(loaded, batch[0])
            else:
                _decode_together(loaded, batch)
    except MLOpsError as exc:
        _fail(batch, exc)
    except BaseException as exc:  # tokenizers panics with what is no Exception
        logger.exception("generation failed for %d requests", len(batch))
        _fail(batch, EngineError(f"generation failed: {type(exc).__name__}: {exc}"))


def _fail(batch: list[_Sequence], error: Exception) -> None:
    for sequence in batch:
        if not sequence.is_finished:
            sequence.error = error


class _AbandonedError(Exception):
    """Leaves mlx-lm's prefill when the request is no longer wanted."""


def _decode_one(loaded: LoadedModel, sequence: _Sequence) -> None:
    try:
        with closing(_single_tokens(loaded, sequence)) as tokens:
            for token in tokens:
                sequence.add(token)
                sequence.look_up()
                if sequence.is_finished:
                    return
    except _AbandonedError:
        return


def _single_tokens(loaded: LoadedModel, sequence: _Sequence) -> Generator[int]:
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    def look_up(_processed: int, _total: int) -> None:
        sequence.look_up()
        if sequence.is_finished:
            raise _AbandonedError

    request = sequence.request
    steps = generate_step(
        mx.array(request.prompt),
        loaded.model,
        _owner_stream(),
        max_tokens=request.max_tokens,
        sampler=make_sampler(request.sampling),
        prefill_step_size=PREFILL_STEP_TOKENS,
        prompt_progress_callback=look_up,
    )
    with closing(steps):
        for token, _logprobs in steps:
            yield token


def _decode_together(loaded: LoadedModel, batch: list[_Sequence]) -> None:
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(
        loaded.model,
        completion_batch_size=len(batch),
        prefill_batch_size=min(len(batch), PREFILL_ROWS),
        prefill_step_size=PREFILL_STEP_TOKENS,
        stream=_owner_stream(),
    )
    with closing(generator):
        ids = generator.insert(
            [list(sequence.request.prompt) for sequence in batch],
            max_tokens=[sequence.request.max_tokens for sequence in batch],
            samplers=[make_sampler(sequence.request.sampling) for sequence in batch],
        )
        running = dict(zip(ids, batch, strict=True))
        while running:
            _, responses = generator.next()
            left_by_itself = set()
            for response in responses:
                if response.finish_reason is not None:
                    left_by_itself.add(response.uid)
                if response.uid in running:
                    _add_contained(running[response.uid], response.token)
            for sequence in running.values():
                sequence.look_up()
            finished = {uid for uid, sequence in running.items() if sequence.is_finished}
            if unwanted := finished - left_by_itself:
                generator.remove(list(unwanted))
            for uid in finished:
                del running[uid]


def _add_contained(sequence: _Sequence, token: int) -> None:
    """Take a token; a text that cannot be decoded fails this sequence, not its whole batch."""
    try:
        sequence.add(token)
    except BaseException as exc:  # tokenizers panics with what is no Exception
        logger.exception("a token could not be decoded")
        sequence.error = EngineError(f"token {token} cannot be decoded: {exc}")


def _owner_stream() -> mx.Stream:
    import mlx.core as mx

    # Not mlx-lm's own stream: that stays on the device that was the default at its import.
    return mx.default_stream(mx.default_device())
