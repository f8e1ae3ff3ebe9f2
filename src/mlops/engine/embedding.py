"""Embeddings: texts into vectors, between the steps of the running batch.

    Engine.embed -> waiting -> (adapter resident) -> groups of texts, one per step -> Future

Policy only: `pooling` computes. A step takes one group of texts that fill a budget of tokens when
they are padded to the longest, whichever requests and adapters they are of. Requests take turns, so
one with two thousand texts does not hold up one with a single text. A text over the budget is
computed in pieces, one at a time, in turn with the groups.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlops.counts import count
from mlops.engine.fields import (
    MAX_PROMPT_TOKENS,
    check_token_ids,
    invalid,
    is_encodable,
    show,
)
from mlops.engine.prompts import check_may_fit
from mlops.engine.residency import Adapter, AdapterRegistry
from mlops.errors import (
    DeadlineExceededError,
    EngineError,
    InvalidRequestError,
    MLOpsError,
    PromptTooLongError,
    QueueFullError,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mlops.engine.banks import AdapterBanks
    from mlops.engine.loading import LoadedModel
    from mlops.engine.pooling import LongInput, Pooler

logger = logging.getLogger(__name__)

MAX_INPUTS = 2048
"""Texts of one request, as with OpenAI."""

SMALLEST_LENGTH = 1e-12
"""What a vector is divided by, at least; torch's own."""


@dataclass(frozen=True)
class EmbeddingRequest:
    """Texts whose vectors are wanted.

    Attributes:
        inputs: token ids of each text.
        adapter: name of an adapter; None is the base model.
        dimensions: cut the vectors to so many numbers; None leaves them whole.
        deadline_s: `time.monotonic()` at which the request's time is over.

    Raises:
        InvalidRequestError: there is no text, or one has no tokens.
    """

    inputs: tuple[tuple[int, ...], ...]
    adapter: str | None = None
    dimensions: int | None = None
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        if not self.inputs or not all(self.inputs):
            raise InvalidRequestError("input must be texts with at least one token each", "input")


@dataclass(frozen=True)
class EmbeddingResult:
    """The vectors of one request.

    Attributes:
        vectors: float32 (texts, dimensions), in the order of the texts.
        prompt_tokens: tokens of all texts.
        adapter: name of the adapter that was used; None is the base model.
    """

    vectors: NDArray[np.float32]
    prompt_tokens: int
    adapter: str | None = None


def tokenize_inputs(
    loaded: LoadedModel, inputs: Any, *, max_prompt_tokens: int | None = None
) -> Iterator[tuple[int, ...]]:
    """The token ids of each text, as the model's tokenizer begins and ends a text.

    Any thread may ask, one at a time: tokenizers are not made for several.

    Args:
        inputs: a text, token ids, or a list of either.
        max_prompt_tokens: the operator's limit for each text, besides the model's context.

    Raises:
        InvalidRequestError: it is none of these, or a text is empty or longer than these limits.
    """
    if isinstance(inputs, str) or (isinstance(inputs, list | tuple) and _is_id(inputs[:1])):
        inputs = [inputs]
    if not isinstance(inputs, list | tuple) or not 1 <= len(inputs) <= MAX_INPUTS:
        raise invalid("input", inputs, f"a text, token ids, or a list of 1 to {MAX_INPUTS} of them")
    kind = str if isinstance(inputs[0], str) else (list, tuple)
    for number, value in enumerate(inputs):
        name = "input" if len(inputs) == 1 else f"input[{number}]"
        if not isinstance(value, kind):
            raise invalid(name, value, "a text or token ids, as the first one is")
        ids = _tokenize(loaded, name, value, max_prompt_tokens)
        if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
            raise PromptTooLongError(
                f"{name} has {count(len(ids), 'token')}; this service takes "
                f"{max_prompt_tokens} at most",
                name,
            )
        yield ids


def _tokenize(
    loaded: LoadedModel, name: str, value: Any, max_prompt_tokens: int | None
) -> tuple[int, ...]:
    if isinstance(value, str):
        if not value or not is_encodable(value):
            raise invalid(name, value, "a text that is not empty")
        check_may_fit(loaded, name, value, max_prompt_tokens)
        ids = tuple(loaded.tokenizer.encode(value))
    else:
        check_token_ids(name, value, 1, MAX_PROMPT_TOKENS)
        ids = tuple(value)
        size = loaded.vocabulary_size
        if size is not None and max(ids) >= size:
            raise InvalidRequestError(
                f"{name} has a token that the model does not know ({max(ids)} of {size})", name
            )
    if not ids:
        raise InvalidRequestError(f"{name} has no tokens; give some text", name)
    if loaded.context_tokens is not None and len(ids) > loaded.context_tokens:
        raise PromptTooLongError(
            f"{name} has {count(len(ids), 'token')}; the model's context is "
            f"{loaded.context_tokens}",
            name,
        )
    return ids


def _is_id(values: Any) -> bool:
    return bool(values) and isinstance(values[0], int)


@dataclass(eq=False)
class _Job:
    """One request under way.

    Attributes:
        number: counts all requests.
        short: numbers of the texts that share a forward pass and are not begun, longest first.
        long: likewise of those that are computed in pieces.
        vectors: by the number of the text; None is not computed yet.
    """

    request: EmbeddingRequest
    adapter: Adapter | None
    future: Future[EmbeddingResult]
    short: deque[int]
    long: deque[int]
    vectors: list[Any] = field(default_factory=list)
    num_missing: int = 0
    is_ended: bool = False
    number: int = field(default_factory=itertools.count().__next__)

    @property
    def slot(self) -> int:
        return 0 if self.adapter is None else self.adapter.slot or 0

    def length(self, number: int) -> int:
        return len(self.request.inputs[number])


@dataclass
class _Long:
    """The text that is computed in pieces.

    Attributes:
        num_bytes: of its caches, once all of it is computed.
    """

    job: _Job
    number: int
    num_bytes: int
    state: LongInput | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.job.request.inputs[self.number]


@dataclass(frozen=True)
class _Begun:
    """What the device computes.

    Attributes:
        texts: whose vectors these are; none for a piece that is not the last of its text.
        jobs: that fail when it fails.
    """

    vectors: Any
    texts: Sequence[tuple[_Job, int]]
    jobs: Sequence[_Job]


class Embedder:
    """The embedding requests of one engine.

    `add` may be called from any thread; everything else from the owner thread.

    Args:
        pooler: what computes; None where the model gives no embeddings.
        budget_tokens: of one step, the padding counted.
        max_waiting: requests that may be there before more are refused.
        cost: bytes of the caches of a text of so many tokens.
        memory_bytes: what caches may take.
    """

    def __init__(
        self,
        pooler: Pooler | None,
        adapters: AdapterRegistry,
        banks: AdapterBanks,
        *,
        budget_tokens: int,
        max_waiting: int,
        cost: Callable[[int], int],
        memory_bytes: int,
    ) -> None:
        self._pooler = pooler
        self._adapters = adapters
        self._banks = banks
        self._budget_tokens = budget_tokens
        self._max_waiting = max_waiting
        self._cost = cost
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._jobs: list[_Job] = []  # the first is next
        self._begun: _Begun | None = None
        self._long: _Long | None = None
        self._is_longs_turn = False
        self._counts = {"requests": 0, "failed": 0, "cancelled": 0, "texts": 0, "tokens": 0}

    @property
    def num_requests(self) -> int:
        """Requests that wait or are computed."""
        return len(self._jobs)

    @property
    def is_computing(self) -> bool:
        """True while the device has something of it to compute."""
        return self._begun is not None

    @property
    def num_bytes(self) -> int:
        """What the text takes, or waits for, that is computed in pieces."""
        return 0 if self._long is None else self._long.num_bytes

    @property
    def active(self) -> list[_Job]:
        """Whose adapter must stay in memory: that of the text which is computed in pieces."""
        long = self._long
        return [] if long is None or long.state is None else [long.job]

    @property
    def wanted(self) -> list[_Job]:
        """The oldest request of each adapter, the oldest of these first."""
        if not self._jobs:  # asked at every step
            return []
        with self._lock:
            jobs = sorted(self._jobs, key=lambda job: job.number)
        oldest: dict[Adapter | None, _Job] = {}
        for job in jobs:
            oldest.setdefault(job.adapter, job)
        return list(oldest.values())

    def describe(self) -> dict[str, int]:
        """Counts since the start, and `running`: requests that are there now."""
        return {**self._counts, "running": self.num_requests}

    def add(
        self,
        request: EmbeddingRequest,
        future: Future[EmbeddingResult],
        acquire: Callable[[], Adapter | None],
    ) -> None:
        """Queue a request.

        Args:
            future: gets the result or the error; to cancel it is to give the request up.
            acquire: gives its adapter, held once more.

        Raises:
            AdapterNotFoundError: no adapter has the request's name.
            InvalidRequestError: the model gives no embeddings, or none of so many dimensions; a
                text can never fit the memory for caches.
            QueueFullError: too many requests are there.
        """
        lengths = [len(one) for one in request.inputs]
        self._check_dimensions(request.dimensions)
        self._check_memory(max(lengths))
        order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
        adapter = acquire()
        job = _Job(
            request,
            adapter,
            future,
            deque(number for number in order if lengths[number] <= self._budget_tokens),
            deque(number for number in order if lengths[number] > self._budget_tokens),
            [None] * len(lengths),
            len(lengths),
        )
        with self._lock:
            is_full = len(self._jobs) >= max(1, self._max_waiting)
            if not is_full:
                self._jobs.append(job)
        if is_full:
            if adapter is not None:
                self._adapters.release(adapter)
            raise QueueFullError(
                f"{count(self._max_waiting, 'request is', 'requests are')} waiting for embeddings, "
                "which is the limit; try later"
            )

    def step(self, can_use: Callable[[Adapter | None], bool], free_bytes: int) -> None:
        """Begin to compute the next group and take the vectors of the one before.

        Args:
            can_use: whether an adapter is in memory and may be used now.
            free_bytes: what a text's caches may take now.
        """
        before, self._begun = self._begun, None
        if self._jobs and self._pooler is not None:
            self._begun = self._begin(self._pooler, can_use, free_bytes)
        if before is not None:
            self._take(before)

    def finish(self) -> None:
        """Wait for what the device computes."""
        before, self._begun = self._begun, None
        if before is not None:
            self._take(before)

    def drop_unwanted(self, now: float) -> None:
        """End what is cancelled or out of time."""
        for job in list(self._jobs):
            deadline_s = job.request.deadline_s
            if job.future.cancelled():
                self._end(job, None)
            elif deadline_s is not None and now >= deadline_s:
                num_done = len(job.vectors) - job.num_missing
                self._end(
                    job,
                    DeadlineExceededError(
                        f"the time for this request is over after {num_done} of "
                        f"{count(len(job.vectors), 'embedding')}"
                    ),
                )

    def fail_without_adapter(self, has_failed: Callable[[Adapter | None], bool]) -> None:
        """End what waits for an adapter that could not be loaded."""
        for job in list(self._jobs):
            if has_failed(job.adapter):
                error = job.adapter.error if job.adapter else None
                self._end(job, error or EngineError("its adapter has failed"))

    def end_all(self, error: Exception) -> None:
        """End every request with an error."""
        self._begun = None
        for job in list(self._jobs):
            self._end(job, error)

    def _check_dimensions(self, dimensions: int | None) -> None:
        if self._pooler is None:
            raise InvalidRequestError("this model gives no embeddings", "input")
        if dimensions is None:
            return
        allowed = self._pooler.pooling.dimensions
        if not 1 <= dimensions <= self._pooler.size:
            raise InvalidRequestError(
                f"dimensions must be from 1 to {self._pooler.size}, which this model's embeddings "
                f"have, not {show(dimensions)}",
                "dimensions",
            )
        if allowed and dimensions not in allowed:
            raise InvalidRequestError(
                f"dimensions must be one of {', '.join(map(str, allowed))}, to which this model "
                f"was trained to be cut, not {dimensions}",
                "dimensions",
            )

    def _check_memory(self, num_tokens: int) -> None:
        needed = self._cost(num_tokens) if num_tokens > self._budget_tokens else 0
        if needed > self._memory_bytes:
            raise InvalidRequestError(
                f"a text of {count(num_tokens, 'token')} needs {needed >> 20} MiB of cache, and "
                f"the engine has {self._memory_bytes >> 20} MiB",
                "input",
            )

    def _begin(
        self, pooler: Pooler, can_use: Callable[[Adapter | None], bool], free_bytes: int
    ) -> _Begun | None:
        self._is_longs_turn = not self._is_longs_turn
        if not self._is_longs_turn and (begun := self._begin_group(pooler, can_use)):
            return begun
        begun = self._begin_piece(pooler, can_use, free_bytes)
        if begun is None and self._is_longs_turn:
            begun = self._begin_group(pooler, can_use)
        return begun

    def _begin_group(
        self, pooler: Pooler, can_use: Callable[[Adapter | None], bool]
    ) -> _Begun | None:
        texts: list[tuple[_Job, int]] = []
        longest = 0
        with self._lock:
            jobs = list(self._jobs)
        for job in jobs:
            if not can_use(job.adapter):
                continue
            while job.short:
                width = max(longest, job.length(job.short[0]))
                if (len(texts) + 1) * width > self._budget_tokens:
                    break
                longest = width
                texts.append((job, job.short.popleft()))
        if not texts:
            return None
        self._move_to_end(texts[0][0])
        return self._launch(
            texts,
            texts,
            lambda: pooler.pool([job.request.inputs[number] for job, number in texts]),
        )

    def _begin_piece(
        self, pooler: Pooler, can_use: Callable[[Adapter | None], bool], free_bytes: int
    ) -> _Begun | None:
        long = self._long = self._long or self._next_long(can_use)
        if long is None:
            return None
        if long.state is None:
            if not can_use(long.job.adapter):  # its room went to another
                self._put_back(long)
                return None
            if long.num_bytes > free_bytes:
                return None
            long.state = pooler.begin()
        state = long.state
        piece = long.tokens[state.num_done : state.num_done + self._budget_tokens]
        is_last = state.num_done + len(piece) == len(long.tokens)
        text = (long.job, long.number)
        if is_last:
            self._long = None
        return self._launch([text], [text] if is_last else [], lambda: state.add(piece))

    def _next_long(self, can_use: Callable[[Adapter | None], bool]) -> _Long | None:
        with self._lock:
            jobs = list(self._jobs)
        job = next((one for one in jobs if one.long and can_use(one.adapter)), None)
        if job is None:
            return None
        self._move_to_end(job)
        number = job.long.popleft()
        return _Long(job, number, self._cost(job.length(number)))

    def _put_back(self, long: _Long) -> None:
        self._long = None
        long.job.long.appendleft(long.number)

    def _move_to_end(self, job: _Job) -> None:
        """Next time another request comes first."""
        with self._lock:
            self._jobs.remove(job)
            self._jobs.append(job)

    def _launch(
        self,
        rows: Sequence[tuple[_Job, int]],
        texts: Sequence[tuple[_Job, int]],
        compute: Callable[[], Any],
    ) -> _Begun | None:
        """Begin a forward pass with each row's adapter; a failure fails its requests."""
        jobs = list(dict.fromkeys(job for job, _ in rows))
        try:
            self._banks.use(self._banks.select([job.slot for job, _ in rows]))
            try:
                return _Begun(compute(), texts, jobs)
            finally:
                self._banks.use(None)
        except BaseException as exc:  # whatever it was, generation goes on
            self._fail(jobs, exc)
            return None

    def _take(self, begun: _Begun) -> None:
        from mlops.engine.pooling import to_host

        try:
            vectors = to_host(begun.vectors)
        except BaseException as exc:
            self._fail(begun.jobs, exc)
            return
        for (job, number), vector in zip(begun.texts, vectors, strict=False):
            if job.is_ended:
                continue
            job.vectors[number] = vector
            job.num_missing -= 1
            self._counts["texts"] += 1
            self._counts["tokens"] += job.length(number)
            if job.num_missing == 0:
                self._complete(job)

    def _complete(self, job: _Job) -> None:
        import numpy as np

        pooler, request = self._pooler, job.request
        vectors = np.stack(job.vectors)[:, : request.dimensions]
        error = None
        if not np.isfinite(vectors).all():
            error = EngineError("the model computed numbers that are not finite for this input")
        elif pooler is not None and pooler.pooling.is_normalized:
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors = vectors / np.maximum(lengths, SMALLEST_LENGTH)
        result = EmbeddingResult(vectors, sum(map(len, request.inputs)), request.adapter)
        self._end(job, error, result)

    def _fail(self, jobs: Sequence[_Job], exc: BaseException) -> None:
        logger.error("computing embeddings failed for %d requests", len(jobs), exc_info=exc)
        error = exc if isinstance(exc, MLOpsError) else None
        for job in jobs:
            self._end(job, error or EngineError(f"embedding failed: {type(exc).__name__}: {exc}"))

    def _end(
        self, job: _Job, error: Exception | None, result: EmbeddingResult | None = None
    ) -> None:
        """Give back what a request held and tell its client; once for each."""
        if job.is_ended:
            return
        job.is_ended = True
        with self._lock:
            self._jobs.remove(job)
        if self._long is not None and self._long.job is job:
            self._long = None
        if job.adapter is not None:
            self._adapters.release(job.adapter)
        self._counts["requests"] += 1
        if not job.future.set_running_or_notify_cancel():
            self._counts["cancelled"] += 1
        elif error is not None:
            self._counts["failed"] += 1
            job.future.set_exception(error)
        else:
            job.future.set_result(result)  # type: ignore[arg-type]
