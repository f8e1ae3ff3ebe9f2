"""The decode batch: one row per running sequence, one token per row and step.

A step is built before the one before it has been computed: its input are that one's tokens, which
only the device knows yet. So Python, sampling and detokenizing cost nothing while the device works.

What a guided row may draw depends on its token before, so there a step has two halves: the logits,
and, when the tokens before them are known, the draw.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from mlops.engine.banks import AdapterBanks
from mlops.engine.guidance import allowed_tokens
from mlops.engine.kv import BatchCaches, Caches, SingleCaches
from mlops.engine.layers import RowSlots
from mlops.engine.sampling import BatchSampler, Draw
from mlops.engine.sequence import Sequence

if TYPE_CHECKING:
    from mlx import nn


@dataclass(frozen=True)
class Step:
    """One step under way: whose tokens they are, and the tokens."""

    sequences: tuple[Sequence, ...]
    draw: Draw


class DecodeBatch:
    """The rows that decode together. Use it in the owner thread only.

    Args:
        max_rows: the most rows.
        can_batch: False for a model that computes one sequence at a time; then there is one row.
    """

    def __init__(
        self,
        model: nn.Module,
        banks: AdapterBanks,
        vocabulary_size: int,
        max_rows: int,
        can_batch: bool,
    ) -> None:
        self.sequences: list[Sequence] = []
        self._model = model
        self._banks = banks
        self._caches: BatchCaches | SingleCaches = (
            BatchCaches(max_rows) if can_batch else SingleCaches()
        )
        self._vocabulary_size = vocabulary_size
        self._sampler = BatchSampler(vocabulary_size)
        self._inputs: mx.array | None = None
        self._logits: mx.array | None = None
        self._slots: RowSlots | None = None
        self._num_adapters = 0
        self._is_guided = False

    @property
    def num_bytes(self) -> int:
        """Bytes that the caches hold."""
        return self._caches.num_bytes

    @property
    def num_adapters(self) -> int:
        """Different adapters among the rows; the base counts as one."""
        return self._num_adapters

    @property
    def is_guided(self) -> bool:
        """True when a row has a guide: then `begin` a step before its `step`."""
        return self._is_guided

    def join(self, sequences: Many[Sequence]) -> None:
        """Append sequences whose prompts are computed; their own caches are given up."""
        last = mx.array([sequence.request.prompt[-1] for sequence in sequences], dtype=mx.int32)
        self._caches.join([sequence.caches for sequence in sequences])
        self._sampler.add([sequence.request for sequence in sequences])
        self._inputs = last if self._inputs is None else mx.concatenate([self._inputs, last])
        for sequence in sequences:
            sequence.caches = None
        self.sequences += sequences
        self._members_changed()

    def leave(self, leaving: Many[Sequence]) -> None:
        """Remove sequences; rows are free afterwards."""
        gone = set(map(id, leaving))
        rows = [row for row, one in enumerate(self.sequences) if id(one) in gone]
        if not rows:
            return
        order = self._caches.leave(rows)
        self.sequences = [self.sequences[row] for row in order]
        self._sampler.keep(order)
        if order and self._inputs is not None:
            self._inputs = self._inputs[mx.array(order)]
        else:
            self._inputs = None
        self._members_changed()

    def release(self) -> None:
        """Give the caches' memory back, when the batch is empty."""
        if not self.sequences:
            self._caches.release()

    def take(self, sequence: Sequence) -> Caches:
        """A copy of the caches of one row, computed before the next step."""
        return self._caches.take(self.sequences.index(sequence))

    def begin(self) -> None:
        """Begin to compute the logits of a step, without waiting for them.

        The tokens of the step before may be given to the guides until `step`.
        """
        self._logits = self._compute_logits()
        mx.async_eval(self._logits, self._caches.arrays())  # type: ignore[no-untyped-call]

    def step(self) -> Step:
        """Begin a step, or the rest of one that has begun, without waiting for it."""
        logits, self._logits = self._logits, None
        draw = self._sampler(self._compute_logits() if logits is None else logits, self._allowed())
        self._inputs = draw.tokens
        for sequence in self.sequences:
            sequence.num_drawn += 1
        of_draw = [draw.tokens, *(draw.logprobs.arrays if draw.logprobs else ())]
        mx.async_eval(of_draw, self._caches.arrays())  # type: ignore[no-untyped-call]
        return Step(tuple(self.sequences), draw)

    def _compute_logits(self) -> mx.array:
        if self._inputs is None:
            raise RuntimeError("an empty batch has no step")
        self._caches.prepare_step()
        self._banks.use(self._slots)
        try:
            logits: mx.array = self._model(self._inputs[:, None], cache=self._caches.layers)
        finally:
            self._banks.use(None)
        self._caches.end_step()
        return logits[:, -1, :]

    def _allowed(self) -> mx.array | None:
        """What rows may draw that go on, bool (rows, vocabulary); None is anything."""
        guides = [None if one.is_finished else one.guide for one in self.sequences]
        if not any(guides):
            return None
        return mx.array(allowed_tokens(guides, self._vocabulary_size))

    def _members_changed(self) -> None:
        slots = [sequence.slot for sequence in self.sequences]
        self._slots = self._banks.select(slots)
        self._num_adapters = len(set(slots))
        self._is_guided = any(one.guide is not None for one in self.sequences)
