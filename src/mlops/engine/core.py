"""The engine: requests join and leave one running batch at every step.

    submit -> waiting -> (adapter resident, memory free) -> prefill, chunk by chunk -> decode batch
    -> tokens -> text -> events and the result

An engine is a chain of calls in the owner thread, one per step, so several engines and everything
else that needs MLX take turns. Each step:

    1. what nobody waits for any more leaves, and so does what has drawn its last token
    2. waiting requests are admitted                                            (scheduler)
    3. prompts, or in turn texts for embeddings, are computed for a budget
       of tokens                                                     (prefill, embedding)
    4. the next step of the decode batch begins                                 (rows)
    5. the tokens of the step before, meanwhile computed, become text           (sequence, text)

Where prompts are computed, 5 comes before 3. Where rows have guides, it comes within 4: logits, 5,
then the draw, for what may be drawn depends on the tokens before (guidance).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from concurrent.futures import Future
from typing import Any, TypeVar, cast

import mlx.core as mx

from mlops.checkpoints import Checkpoint, check_copies
from mlops.counts import count
from mlops.engine import kv
from mlops.engine.adapter_loading import AdapterLoader, Asking
from mlops.engine.adapter_tokenizers import AdapterTokenizers
from mlops.engine.config import EngineConfig
from mlops.engine.embedding import Embedder, EmbeddingRequest, EmbeddingResult
from mlops.engine.held_adapter import HeldAdapter
from mlops.engine.layout import MEMORY_SHARE
from mlops.engine.loading import LoadedModel
from mlops.engine.owner import (
    in_owner,
    is_stopping,
    run_in_owner,
    submit_to_owner,
)
from mlops.engine.prefill import new_caches, prefill
from mlops.engine.prefix import PrefixCache
from mlops.engine.request import GenerationRequest
from mlops.engine.residency import Adapter, AdapterRegistry
from mlops.engine.rows import DecodeBatch, Step
from mlops.engine.scheduler import Admission, Scheduler, share_prefill
from mlops.engine.sequence import (
    Generation,
    GenerationResult,
    Sequence,
    TokenLogprobs,
    wake_readers,
)
from mlops.engine.statistics import EngineStatistics
from mlops.engine.text import TextBuilder
from mlops.errors import (
    AdapterNotFoundError,
    DeadlineExceededError,
    EngineError,
    EngineShutdownError,
    InvalidRequestError,
    MLOpsError,
)
from mlops.hardware import detect

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
MIB = 2**20
LEAST_FREE_BYTES = 64 * MIB
PREFILL_TOKENS = {"cpu": 256, "gpu": 2048}
"""Prompt tokens of one step: what a device computes in about the time of a few decode steps."""

WAITING_POLL_S = 0.02
"""How often requests are looked at that wait for an adapter while nothing is computed."""

CACHE_SHARE, PREFIX_SHARE, ADAPTER_SHARE = 0.5, 0.15, 0.15
"""Of the memory that the weights leave free: running requests, prefix cache, adapters."""


_Namespace = tuple[str | None, Any, str]
"""What cached state depends on besides the tokens: model digest, adapter key, tenant salt."""


class Engine:
    """Text generation for one loaded model. Every public method may be called from any thread."""

    def __init__(self, loaded: LoadedModel, config: EngineConfig | None = None) -> None:
        config = config or EngineConfig()
        free = _free_bytes(config.memory_bytes)
        self.loaded = loaded
        self.config = config
        self.max_rows = config.max_rows if loaded.can_batch else 1
        self._statistics = EngineStatistics()
        self._budget = _or(config.cache_memory_bytes, int(free * CACHE_SHARE))
        self._prefill_tokens = config.prefill_tokens or PREFILL_TOKENS[loaded.device]
        self._scheduler = Scheduler(config.max_waiting)
        self._prefix_bytes = _or(config.prefix_memory_bytes, int(free * PREFIX_SHARE))
        self._prefix = PrefixCache(self._prefix_bytes)
        self.adapters = AdapterRegistry(
            budget_bytes=_or(config.adapter_memory_bytes, int(free * ADAPTER_SHARE)),
            max_resident=config.max_resident_adapters,
        )
        self._loader = AdapterLoader(
            self.adapters, loaded.banks, finish_step=self._finish_all, wake=self._schedule
        )
        self._embedder = Embedder(
            loaded.pooler,
            self.adapters,
            loaded.banks,
            budget_tokens=self._prefill_tokens,
            max_waiting=config.max_waiting,
            cost=lambda num_tokens: self._cost(1, num_tokens),
            memory_bytes=self._budget,
        )
        self._tokenizers = AdapterTokenizers(loaded)
        self._batch = self._new_batch()
        self._prefilling: list[Sequence] = []
        self._in_flight: Step | None = None
        self._lock = threading.Lock()
        self._is_scheduled = False
        self._is_polling = False
        self._is_closed = False
        self._num_turns = 0
        self._idle = threading.Event()
        self._idle.set()

    # What clients call.

    def submit(self, request: GenerationRequest, held: HeldAdapter | None = None) -> Generation:
        """Queue one request; returns at once.

        Args:
            held: what the request's adapter meant when its prompt was made; by default what it
                means now.

        Raises:
            AdapterNotFoundError: no adapter has the request's name.
            InvalidRequestError: it can never fit the memory for caches, or its grammar cannot be
                used.
            QueueFullError: too many requests wait.
            EngineShutdownError: the engine is closed.
        """
        self._check_memory(request)
        adapter = self._acquire(request.adapter, held)
        try:
            sequence = self._begin(request, adapter)
            self._queue(sequence)
        except BaseException:
            if adapter is not None:
                self.adapters.release(adapter)
            raise
        self._statistics.on_submit(request.adapter)
        self._schedule()
        return sequence.generation

    def hold(self, adapter: str | None) -> HeldAdapter:
        """What this name means now, for a request that is being made; to be released.

        Raises:
            AdapterNotFoundError: no adapter has this name.
        """
        return HeldAdapter(
            self.adapters, adapter, load=self._loaded_for, on_release=self._unload_replaced
        )

    def loaded_for(self, adapter: str | None) -> LoadedModel:
        """The model as requests for this adapter see it: with its tokenizer and templates.

        May take a second, for an adapter with a tokenizer of its own: see `has_tokenizer`.

        Raises:
            AdapterNotFoundError: no adapter has this name.
            PackagingError: its tokenizer cannot be used.
        """
        return self._loaded_for(None if adapter is None else self.adapters.find(adapter))

    def has_tokenizer(self, adapter: str | None) -> bool:
        """False when `loaded_for` would have to read a tokenizer first."""
        try:
            files = None if adapter is None else self.adapters.find(adapter).tokenizer
        except AdapterNotFoundError:
            return True
        return files is None or self._tokenizers.has(files)

    def embed(
        self,
        request: EmbeddingRequest,
        future: Future[EmbeddingResult] | None = None,
        held: HeldAdapter | None = None,
    ) -> Future[EmbeddingResult]:
        """Queue texts to be made vectors; returns at once.

        Args:
            future: what to put the result into; a new one by default.
            held: as in `submit`.

        Returns:
            The future: gets the result, or the error that ended the request. To cancel it is to
            give the request up.

        Raises:
            AdapterNotFoundError: no adapter has the request's name.
            InvalidRequestError: the model gives no embeddings, or not these.
            QueueFullError: too many requests wait.
            EngineShutdownError: the engine is closed.
        """
        future = Future() if future is None else future
        with self._lock:
            if self._is_closed:
                raise EngineShutdownError("the engine is closed")
            self._embedder.add(request, future, lambda: self._acquire(request.adapter, held))
            self._idle.clear()
        self._schedule()
        return future

    def wait(self, generation: Generation) -> GenerationResult:
        """The result of a generation; the owner thread, which nobody else can, runs the steps.

        Raises:
            EngineError: what ended it.
        """
        while in_owner() and not generation.future.done():
            self._guarded_step()
            if not self._is_computing:
                time.sleep(WAITING_POLL_S)
        return generation.result()

    def add_adapter(
        self,
        name: str,
        checkpoint: Checkpoint,
        *,
        digest: str | None = None,
        verify: Callable[[], None] | None = None,
        is_pinned: bool = False,
    ) -> None:
        """Make an adapter known; it is loaded when a request first names it, or by `preload`.

        The same name again replaces it: requests under way finish with the old one.

        Args:
            digest: part of the prefix cache's key.
            verify: checks its files, in a thread of its own, each time before they are loaded.
            is_pinned: once loaded it stays.

        Raises:
            PackagingError: it is not an adapter, or does not fit the base model.
            EngineError: the name cannot be used.
        """
        check_copies(checkpoint, self.loaded.checkpoint)
        tokenizer = self._tokenizers.files_of(checkpoint)
        self.adapters.register(
            name,
            checkpoint,
            num_bytes=self.loaded.banks.num_bytes(checkpoint),
            digest=digest,
            verify=verify if tokenizer is None else self._tokenizers.verifying(tokenizer, verify),
            tokenizer=tokenizer,
            pin=is_pinned,
        )
        self._schedule()  # the one that it replaced may have no users

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; requests under way finish with it.

        Raises:
            AdapterNotFoundError: there is none of this name.
        """
        self.adapters.unregister(name)
        self._schedule()

    def pin_adapter(self, name: str, is_pinned: bool = True) -> None:
        """Keep an adapter in memory from its next use on, or let it go again.

        Raises:
            AdapterNotFoundError: there is none of this name.
        """
        self.adapters.pin(name, is_pinned)

    def preload(self, *names: str) -> None:
        """Load adapters, in the order of their registration or these, as long as there is room.

        Raises:
            AdapterNotFoundError: there is none of such a name.
            MLOpsError: one of them is damaged or cannot be used.
        """
        self._loader.preload(names or self.adapters.names)

    def statistics(self) -> dict[str, Any]:
        """Counts and sums since the start, in JSON types. Never waits for a step."""
        snapshot = self._statistics.snapshot()
        return {
            **snapshot,
            "batch_sizes": snapshot["steps"]["by_rows"],
            "running": len(self._batch.sequences) + len(self._prefilling),
            "waiting": self._scheduler.num_waiting,
            "turns": self._num_turns,  # also those that could do nothing but look
            "running_adapters": _by_adapter([*self._batch.sequences, *self._prefilling]),
            "waiting_adapters": self._scheduler.num_waiting_by_adapter(),
            "max_rows": self.max_rows,
            "max_running_adapters": min(
                self.max_rows, _or(self.config.max_resident_adapters, self.max_rows)
            ),
            "cache": {"bytes": self._batch.num_bytes, "budget_bytes": self._budget},
            "prefix_cache": self._prefix.describe(),
            "resident_adapters": self.adapters.describe(),
            "embeddings": self._embedder.describe(),
        }

    def close(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, let those under way finish for `drain_s`, end the others.

        Requests that are still there then fail with `EngineShutdownError`. Does nothing the second
        time.
        """
        with self._lock:
            self._is_closed = True
        if drain_s > 0:
            self._idle.wait(drain_s)
        run_in_owner(self._end_all, EngineShutdownError("the engine is closed"))

    def _begin(self, request: GenerationRequest, adapter: Adapter | None) -> Sequence:
        loaded = self._loaded_for(adapter)
        end_tokens = () if request.ignore_eos else loaded.tokenizer.eos_token_ids
        return Sequence(
            request,
            Generation(),
            adapter,
            TextBuilder(loaded.tokenizer.detokenizer, request.stop),
            frozenset(end_tokens) | frozenset(request.stop_token_ids),
            None if request.grammar is None else loaded.guidance.start(request.grammar),
        )

    def _acquire(self, name: str | None, held: HeldAdapter | None) -> Adapter | None:
        if held is not None:
            return held.share()
        return None if name is None else self.adapters.acquire(name)

    def _unload_replaced(self) -> None:
        if self.adapters.drained():
            self._schedule()

    def _queue(self, sequence: Sequence) -> None:
        with self._lock:
            if self._is_closed:
                raise EngineShutdownError("the engine is closed")
            self._scheduler.add(sequence)
            self._idle.clear()

    def _loaded_for(self, adapter: Adapter | None) -> LoadedModel:
        if adapter is None or adapter.tokenizer is None:
            return self.loaded
        if adapter.verify is not None and not self._tokenizers.has(adapter.tokenizer):
            adapter.verify()
        return self._tokenizers.model_for(adapter.tokenizer)

    # The chain of steps, in the owner thread.

    @property
    def _is_computing(self) -> bool:
        return bool(
            self._prefilling
            or self._batch.sequences
            or self._in_flight
            or self._embedder.is_computing
        )

    def _schedule(self) -> None:
        with self._lock:
            if self._is_scheduled:
                return
            self._is_scheduled = True
        try:
            submit_to_owner(self._run_step)
        except EngineShutdownError as exc:  # the interpreter exits: nobody will compute this
            with self._lock:
                waiting = self._scheduler.remove(lambda _: True)
            for sequence in waiting:
                sequence.fail(exc)
                self._close(sequence)
            self._embedder.end_all(exc)

    def _run_step(self) -> None:
        with self._lock:
            self._is_scheduled = False
        self._guarded_step()
        self._num_turns += 1
        if self._is_computing or self.adapters.drained():
            self._schedule()
            return
        self._batch.release()
        with self._lock:
            if self._scheduler.num_waiting == 0 and self._embedder.num_requests == 0:
                self._idle.set()
                return
            if self._is_polling:
                return
            self._is_polling = True
        # They wait for an adapter that is being verified; meanwhile one may be cancelled.
        timer = threading.Timer(WAITING_POLL_S, self._poll)
        timer.daemon = True
        timer.start()

    def _poll(self) -> None:
        with self._lock:
            self._is_polling = False
        self._schedule()

    def _guarded_step(self) -> None:
        try:
            self._step()
        except BaseException as exc:  # whatever it was, those who wait are told, and it goes on
            logger.exception("a step of the engine failed")
            self._end_all(_as_engine_error(exc))
        if is_stopping():
            self._end_all(EngineShutdownError("the interpreter is exiting; generation has ended"))

    def _step(self) -> None:
        self._loader.finish_loading()
        self._drop_unwanted()
        self._leave()
        if gone := self._loader.unload_drained():
            self._prefix.drop(lambda namespace: cast("_Namespace", namespace)[1] not in gone)
        self._admit()
        if self._prefilling or self._embedder.num_requests:
            # Or their clients would wait for a prompt to be computed that is not theirs.
            self._finish_step()
            self._leave()
        self._embed()
        if not self._embedder.is_computing:
            self._prefill()
        before, self._in_flight = self._in_flight, None
        if before is not None and self._batch.is_guided:
            # What a guided row may draw depends on its token before. The device goes on meanwhile.
            self._on_batch(self._batch.begin)
            self._take_tokens(before)
            before = None
        self._in_flight = self._decode()
        if before is not None:
            self._take_tokens(before)

    def _drop_unwanted(self) -> None:
        """End what is cancelled or out of time, wherever it is."""
        now = time.monotonic()
        with self._lock:
            dropped = self._scheduler.remove(lambda sequence: _is_unwanted(sequence, now))
        dropped += [one for one in self._prefilling if _is_unwanted(one, now)]
        running = [one for one in self._batch.sequences if _is_unwanted(one, now)]
        self._prefilling = [one for one in self._prefilling if one not in dropped]
        for sequence in dropped + running:
            if not sequence.is_finished:
                _end_unwanted(sequence)
                self._close(sequence)
        self._embedder.drop_unwanted(now)

    def _leave(self) -> None:
        """Free the rows of what is finished or has drawn its last token."""
        batch = self._batch
        leaving = [one for one in batch.sequences if one.is_finished or one.has_drawn_all]
        if not leaving:
            return
        staying = [one for one in batch.sequences if one not in leaving]
        self._keep([one for one in leaving if one.error is None and not one.is_cancelled])
        try:
            batch.leave(leaving)
        except BaseException as exc:
            self._fail(exc, staying, "leaving the batch")
            self._reset_batch()

    def _admit(self) -> None:
        limit = self.max_rows
        if self.config.row_limit is not None:
            limit = max(1, min(limit, self.config.row_limit()))
        active = [*self._batch.sequences, *self._prefilling]
        with self._lock:
            heads = self._scheduler.heads(active)[: max(0, limit - len(active))]
        asking: list[Asking] = [*self._embedder.wanted, *heads]
        if not asking:
            return
        self._loader.load_for(asking, [*active, *self._embedder.active])
        self._fail_without_adapter()
        lengths = [sequence.max_length for sequence in active]
        budget = self._budget - self._embedder.num_bytes

        def can_admit(sequence: Sequence) -> Admission:
            if not self._loader.can_use(sequence.adapter):
                return Admission.NOT_YET
            if self._cost(len(lengths) + 1, max(sequence.max_length, *lengths, 0)) > budget:
                return Admission.STOP
            lengths.append(sequence.max_length)
            return Admission.YES

        with self._lock:
            admitted = self._scheduler.admit(active, limit, can_admit)
        for sequence in admitted:
            sequence.started_s = time.monotonic()
            try:
                self._find_prefix(sequence)
            except BaseException as exc:
                self._fail(exc, [sequence], "beginning a prompt")
            else:
                self._prefilling.append(sequence)

    def _fail_without_adapter(self) -> None:
        with self._lock:
            failed = self._scheduler.remove(lambda one: self._loader.has_failed(one.adapter))
        for sequence in failed:
            adapter = sequence.adapter
            sequence.fail((adapter and adapter.error) or EngineError("its adapter has failed"))
            self._close(sequence)
        self._embedder.fail_without_adapter(self._loader.has_failed)

    def _embed(self) -> None:
        """Texts to be made vectors and prompts take turns: a step has one budget of tokens."""
        if self._prefilling and self._embedder.is_computing:
            self._embedder.finish()
        elif self._embedder.num_requests or self._embedder.is_computing:
            self._embedder.step(self._loader.can_use, self._budget - self._cost_of_rows)

    def _prefill(self) -> None:
        shares = share_prefill(self._prefilling, self._prefill_tokens)
        if not self.loaded.can_batch:
            shares = shares[:1]
        # Caches that are empty and caches that are not cannot be merged by mlx-lm.
        for is_begun in (True, False):
            group = [(one, size) for one, size in shares if (one.num_prefilled > 0) is is_begun]
            if group and self.loaded.trial.can_prefill_together:
                self._prefill_group(group)
            else:
                for share in group:
                    self._prefill_group([share])
        ready = [one for one in self._prefilling if one.num_to_prefill <= 0]
        if ready:
            self._prefilling = [one for one in self._prefilling if one.num_to_prefill > 0]
            try:
                self._batch.join(ready)
            except BaseException as exc:
                self._fail(exc, [*ready, *self._batch.sequences], "joining the batch")
                self._reset_batch()

    def _prefill_group(self, group: Many[tuple[Sequence, int]]) -> None:
        sequences = [sequence for sequence, _ in group]
        banks = self.loaded.banks
        try:
            tokens = [
                one.request.prompt[one.num_prefilled : one.num_prefilled + size]
                for one, size in group
            ]
            banks.use(banks.select([sequence.slot for sequence in sequences]))
            try:
                caches = prefill(self.loaded.model, [one.caches for one in sequences], tokens)
            finally:
                banks.use(None)
        except BaseException as exc:
            self._fail(exc, sequences, "computing a prompt")
            self._prefilling = [one for one in self._prefilling if not one.is_finished]
            return
        self._statistics.on_prefill(sum(size for _, size in group))
        for (sequence, size), of_sequence in zip(group, caches, strict=True):
            sequence.caches = of_sequence
            sequence.num_prefilled += size
            if sequence.num_to_prefill == 0 and self._prefix_bytes > 0:
                with self._harming_none():
                    kept = kv.compact(sequence.caches)
                    kv.begin_computing([kept])
                    self._remember(sequence, sequence.num_prefilled, kept)

    def _decode(self) -> Step | None:
        batch = self._batch
        step = self._on_batch(batch.step) if batch.sequences else None
        if step is not None:
            self._statistics.on_step(len(step.sequences), batch.num_adapters)
        return step

    def _on_batch(self, do: Callable[[], Result]) -> Result | None:
        """Do this; when it fails, so do the rows of the batch, and None comes back."""
        try:
            return do()
        except BaseException as exc:
            self._fail(exc, self._batch.sequences, "a decode step")
            self._reset_batch()
            return None

    def _take_tokens(self, step: Step) -> None:
        """Wait for a step, and give its tokens to their sequences."""
        try:
            tokens = cast("list[int]", step.draw.tokens.tolist())
            logprobs = _read_logprobs(step, tokens)
        except BaseException as exc:
            self._fail(exc, [*step.sequences, *self._batch.sequences], "a decode step")
            self._reset_batch()
            self._in_flight = None
            return
        generations = []
        for sequence, token, of_token in zip(step.sequences, tokens, logprobs, strict=True):
            was_finished = sequence.is_finished  # by a stop that the step did not know of
            if was_finished:
                continue
            try:
                sequence.add(token, of_token)
            except EngineError as exc:  # its guide cannot go on
                sequence.fail(exc)
            except BaseException as exc:  # tokenizers panics with what is no Exception
                logger.exception("a token could not be turned into text")
                sequence.fail(EngineError(f"token {token} cannot be turned into text: {exc}"))
            if sequence.is_finished:
                self._close(sequence)
            elif sequence.generation.is_streamed:
                sequence.publish()
                generations.append(sequence.generation)
        if generations:
            wake_readers(generations)

    def _close(self, sequence: Sequence) -> None:
        """Give back what the sequence held and tell the client the end; once for each."""
        kept, sequence.kept, sequence.caches = sequence.kept, None, None
        if kept is not None and sequence.error is None:
            self._remember(sequence, sequence.num_computed, kept)
        try:
            if sequence.adapter is not None:
                self.adapters.release(sequence.adapter)
            submitted_s, now = sequence.submitted_s, time.monotonic()
            started_s, first_token_s = sequence.started_s, sequence.first_token_s
            self._statistics.on_finish(
                sequence.request.adapter,
                sequence.finish_reason or "error",
                prompt_tokens=len(sequence.request.prompt),
                completion_tokens=len(sequence.tokens),
                queue_s=None if started_s is None else started_s - submitted_s,
                first_token_s=None if first_token_s is None else first_token_s - submitted_s,
                total_s=now - submitted_s,
            )
        finally:
            sequence.publish()
            wake_readers([sequence.generation])

    def _finish_all(self) -> None:
        """Wait for all that the device computes."""
        self._embedder.finish()
        self._finish_step()

    def _finish_step(self) -> None:
        step, self._in_flight = self._in_flight, None
        if step is not None:
            self._take_tokens(step)

    # Prefixes.

    def _namespace(self, sequence: Sequence) -> _Namespace:
        key = None if sequence.adapter is None else sequence.adapter.key
        return self.loaded.digest, key, sequence.request.cache_salt

    def _find_prefix(self, sequence: Sequence) -> None:
        """Begin with what an earlier request computed, as far as the prompts are the same."""
        sequence.caches = new_caches(self.loaded.model)
        if self._prefix_bytes == 0 or sequence.num_to_prefill == 0:
            return
        with self._harming_none():
            match = self._prefix.find(self._namespace(sequence), sequence.request.prompt[:-1])
            if match is not None:
                sequence.caches = kv.cut(match.value, match.num_tokens)
                sequence.num_prefilled = sequence.num_cached = match.num_tokens
                self._statistics.on_cached(match.num_tokens)

    def _keep(self, leaving: Many[Sequence]) -> None:
        """Keep copies of rows for the prefix cache until all of their tokens are known."""
        if self._prefix_bytes == 0 or not leaving:
            return
        with self._harming_none():
            copies = [self._batch.take(sequence) for sequence in leaving]
            # Now, and not with the next step: while something else holds the rectangle, to write
            # into it is to copy all of it.
            kv.compute(copies)
            for sequence, caches in zip(leaving, copies, strict=True):
                if sequence.is_finished:
                    self._remember(sequence, sequence.num_computed, caches)
                else:
                    sequence.kept = caches

    def _remember(self, sequence: Sequence, num_tokens: int, caches: kv.Caches) -> None:
        """Offer the state after the first `num_tokens` tokens to later requests."""
        if self._prefix_bytes == 0:
            return
        with self._harming_none():
            self._prefix.add(
                self._namespace(sequence),
                sequence.all_tokens[:num_tokens],
                caches,
                num_bytes=sum(cache.nbytes for cache in caches),
                can_cut=kv.can_cut(caches),
            )

    @contextlib.contextmanager
    def _harming_none(self) -> Iterator[None]:
        """A failure of the prefix cache fails no request; the cache begins anew, empty."""
        try:
            yield
        except Exception:
            logger.exception("the prefix cache failed and is emptied")
            self._prefix = PrefixCache(self._prefix_bytes)
            _free_memory()

    # Memory.

    def _cost(self, num_rows: int, num_tokens: int) -> int:
        """Bytes of a batch whose longest row has `num_tokens`: rows are as wide as the longest."""
        return num_rows * self.loaded.trial.cache_cost.num_bytes(num_tokens)

    @property
    def _cost_of_rows(self) -> int:
        """Bytes of the batch with the prompts that will join it, at their longest."""
        active = [*self._batch.sequences, *self._prefilling]
        return self._cost(len(active), max((one.max_length for one in active), default=0))

    def _check_memory(self, request: GenerationRequest) -> None:
        needed = self._cost(1, len(request.prompt) + request.max_tokens)
        if needed > self._budget:
            raise InvalidRequestError(
                f"max_tokens is {request.max_tokens}; with this prompt of {len(request.prompt)} "
                f"tokens the request may need {_mib(needed)} MiB of cache, and the engine has "
                f"{_mib(self._budget)} MiB",
                "max_tokens",
            )

    # Ends and failures.

    def _fail(self, exc: BaseException, sequences: Many[Sequence], doing: str) -> None:
        """End what a failure touched; the others go on."""
        error = _as_engine_error(exc)
        unfinished = {id(one): one for one in sequences if not one.is_finished}
        logger.error("%s failed for %d requests", doing, len(unfinished), exc_info=exc)
        for sequence in unfinished.values():
            sequence.fail(error)
            self._close(sequence)
        del exc
        _free_memory()

    def _reset_batch(self) -> None:
        self._batch = self._new_batch()

    def _new_batch(self) -> DecodeBatch:
        return DecodeBatch(
            self.loaded.model,
            self.loaded.banks,
            self.loaded.trial.num_logits,
            self.max_rows,
            self.loaded.can_batch,
        )

    def _end_all(self, error: Exception) -> None:
        with self._lock:
            sequences = self._scheduler.remove(lambda _: True)
        sequences += [*self._prefilling, *self._batch.sequences]
        if self._in_flight is not None:
            sequences += [one for one in self._in_flight.sequences if one not in sequences]
        self._in_flight = None
        self._prefilling = []
        self._reset_batch()
        for sequence in sequences:
            if not sequence.is_finished:
                sequence.fail(error)
                self._close(sequence)
        self._embedder.end_all(error)
        with self._lock:
            self._idle.set()


def _is_unwanted(sequence: Sequence, now: float) -> bool:
    deadline_s = sequence.request.deadline_s
    return sequence.generation.is_cancelled or (deadline_s is not None and now >= deadline_s)


def _end_unwanted(sequence: Sequence) -> None:
    if sequence.generation.is_cancelled:
        try:
            sequence.finish("cancelled")
        except BaseException as exc:  # tokenizers panics with what is no Exception
            sequence.fail(EngineError(f"the last tokens cannot be turned into text: {exc}"))
        return
    sequence.fail(
        DeadlineExceededError(
            f"the time for this request is over after {len(sequence.tokens)} of at most "
            f"{count(sequence.request.max_tokens, 'token')}"
        )
    )


def _read_logprobs(step: Step, tokens: Many[int]) -> list[TokenLogprobs | None]:
    """Each row's log-probabilities, for those rows that asked for them."""
    drawn = step.draw.logprobs
    if drawn is None:
        return [None] * len(tokens)
    chosen: Any = drawn.chosen.tolist()
    top_ids: Any = drawn.top_ids.tolist()
    top_logprobs: Any = drawn.top_logprobs.tolist()
    found: list[TokenLogprobs | None] = []
    for row, (sequence, token) in enumerate(zip(step.sequences, tokens, strict=True)):
        wanted = sequence.request.logprobs
        if wanted is None:
            found.append(None)
            continue
        top = zip(top_ids[row][:wanted], top_logprobs[row][:wanted], strict=True)
        found.append(TokenLogprobs(token, chosen[row], tuple(top)))
    return found


def _as_engine_error(exc: BaseException) -> Exception:
    if isinstance(exc, MLOpsError):
        return exc
    return EngineError(f"generation failed: {type(exc).__name__}: {exc}")


def _free_bytes(memory_bytes: int | None) -> int:
    """Memory that the weights leave free, of what this process may use."""
    if memory_bytes is None:
        memory_bytes = int(detect().memory_bytes * MEMORY_SHARE)
    return max(LEAST_FREE_BYTES, memory_bytes - mx.get_active_memory())


def _free_memory() -> None:
    gc.collect()
    mx.clear_cache()


def _by_adapter(sequences: Many[Sequence]) -> dict[str, int]:
    """How many sequences use each adapter; those of the base model are left out."""
    names = (sequence.adapter_name for sequence in sequences)
    return dict(Counter(name for name in names if name is not None))


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _mib(num_bytes: int) -> int:
    return -(-num_bytes // MIB)
