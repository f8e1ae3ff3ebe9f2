"""The next token of every row of a batch, drawn in one call.

    logits -> adjustments (bias, penalties) -> what a grammar allows
    -> greedy: argmax, others: drawing -> tokens

A plain greedy batch costs one argmax. Rows with different settings share a call, and a row gets
what it would get alone. Nothing waits for the device: what depends on drawn tokens stays there. A
feature costs only while a row uses it; what does is found out when rows come and go, not at every
step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mlops.engine.adjustments import Adjustments
from mlops.engine.drawing import LOG2_E, Group, choose_way, find_largest
from mlops.engine.request import MAX_LOGPROBS, GenerationRequest
from mlops.engine.subset import Subset

if TYPE_CHECKING:
    import mlx.core as mx


@dataclass(frozen=True)
class DrawLogprobs:
    """Log-probabilities of the model itself: before bias, penalties and temperature.

    Rows that did not ask hold zeros.

    Attributes:
        chosen: of the drawn tokens, float32 (rows,).
        top_ids: the likeliest tokens, likeliest first, int32 (rows, most asked for).
        top_logprobs: theirs, float32 (rows, most asked for).
    """

    chosen: mx.array
    top_ids: mx.array
    top_logprobs: mx.array

    @property
    def arrays(self) -> list[mx.array]:
        """All of them, to be computed together."""
        return [self.chosen, self.top_ids, self.top_logprobs]


@dataclass(frozen=True)
class Draw:
    """What a step drew, not computed yet.

    Attributes:
        tokens: int32 (rows,).
        logprobs: None when no row asked.
    """

    tokens: mx.array
    logprobs: DrawLogprobs | None


class BatchSampler:
    """Draws for the rows of one batch, which come and go. For the owner thread.

    A row whose logits hold NaN or infinity gets some token of the vocabulary; others are unharmed.

    Args:
        vocabulary_size: columns of the logits.
    """

    def __init__(self, vocabulary_size: int) -> None:
        self._vocabulary_size = vocabulary_size
        self._rows: list[GenerationRequest] = []
        self._generators: list[np.random.PCG64] = []
        self._adjustments = Adjustments(vocabulary_size)
        self._prepare()

    def add(self, rows: Sequence[GenerationRequest]) -> None:
        """Append rows that have drawn nothing yet, in their order."""
        self._adjustments.add(rows)
        self._rows += rows
        self._generators += [np.random.PCG64(row.sampling.seed) for row in rows]
        self._prepare()

    def keep(self, rows: Sequence[int]) -> None:
        """Make row i what row `rows[i]` was; rows that are not named are dropped."""
        self._adjustments.keep(rows)
        self._rows = [self._rows[row] for row in rows]
        self._generators = [self._generators[row] for row in rows]
        self._prepare()

    def __call__(self, logits: mx.array, allowed: mx.array | None = None) -> Draw:
        """Draw a token for every row, without waiting for the device.

        Args:
            logits: float (rows, vocabulary).
            allowed: bool (rows, vocabulary): only these are drawn; None is all.
        """
        import mlx.core as mx

        adjusted = self._adjustments.apply(logits)
        if allowed is not None:
            adjusted = mx.where(allowed, adjusted, -mx.inf)
        if self._has_greedy:
            tokens = mx.argmax(adjusted, axis=-1).astype(mx.int32)
        else:
            tokens = mx.zeros((len(self._rows),), dtype=mx.int32)
        for group in self._groups:
            drawn = group.draw(group.rows.take(adjusted).astype(mx.float32))
            tokens = group.rows.put(tokens, drawn)
        self._adjustments.count(tokens)
        return Draw(tokens, self._find_logprobs(logits, tokens))

    def _prepare(self) -> None:
        """Find out what every step has to do for the rows that there are."""
        size = self._vocabulary_size
        ways = [choose_way(row.sampling, size) for row in self._rows]
        self._has_greedy = None in ways
        self._groups: list[Group] = []
        for way in dict.fromkeys(ways):
            if way is not None:
                rows = [row for row, other in enumerate(ways) if other == way]
                samplings = [self._rows[row].sampling for row in rows]
                generators = [self._generators[row] for row in rows]
                subset = Subset(rows, len(ways))
                self._groups.append(Group(subset, samplings, generators, way.num_candidates, size))
        asked = [row.logprobs for row in self._rows if row.logprobs is not None]
        self._num_logprobs = max(asked, default=0)
        self._asking = Subset.choose(self._rows, lambda row: row.logprobs is not None)

    def _find_logprobs(self, logits: mx.array, tokens: mx.array) -> DrawLogprobs | None:
        import mlx.core as mx

        asking = self._asking
        if asking is None:
            return None
        num_rows, vocabulary_size = logits.shape
        number = min(self._num_logprobs, vocabulary_size)
        own = asking.take(logits).astype(mx.float32)
        largest = own.max(axis=-1, keepdims=True)
        total = mx.power(2.0, (own - largest) * LOG2_E).sum(axis=-1, keepdims=True)
        normalizer = largest + mx.log(total)
        chosen = mx.take_along_axis(own, asking.take(tokens)[:, None], axis=-1) - normalizer
        top_ids = mx.zeros((num_rows, number), dtype=mx.int32)
        top_logprobs = mx.zeros((num_rows, number))
        if number:  # MLX ends the process when it writes into arrays of size 0
            # Always so many: which of equally likely tokens come does not depend on other rows.
            ids, top = find_largest(own, min(MAX_LOGPROBS, vocabulary_size))
            top_ids = asking.put(top_ids, ids[:, :number])
            top_logprobs = asking.put(top_logprobs, top[:, :number] - normalizer)
        chosen = asking.put(mx.zeros((num_rows,)), chosen[:, 0])
        return DrawLogprobs(chosen, top_ids, top_logprobs)
