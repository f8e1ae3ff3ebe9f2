"""Drawing one token for each of some rows, by their temperature and filters.

    logits -> temperature -> min_p -> top_k -> top_p -> one token a row

The order is vLLM's. A filter sees the probabilities that the one before it left, made to sum to 1.
A row draws one uniform number a step from its own generator, and takes the token at which the
cumulative weights pass it. (One random number for every token of the vocabulary, as with the Gumbel
trick, costs far more.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mlops.engine.request import Sampling
from mlops.engine.subset import Subset, column

if TYPE_CHECKING:
    import mlx.core as mx

LOWEST_TEMPERATURE = 1e-4
"""Below it, dividing by the temperature leaves nothing but the most likely token."""

CANDIDATES = (64, 1024)
"""A row whose `top_k` is at most one of these is drawn from so many sorted candidates."""

TOP_P_PASSES = 16
"""Halvings of the search for `top_p`'s limit: probabilities that differ by 0.2 % are told apart."""

TOP_K_PASSES = 30
"""Halvings that tell all float32 from 0 to 1 apart."""

BITS_ABOVE_ONE = 0x3F800001
"""The float32 after 1.0, read as an integer; float32 from 0 on are ordered as these integers."""

LOG2_E = 1.4426950408889634
UNIFORM_BITS = 31
SUM_OF_SHARES = 2.0**30


@dataclass(frozen=True)
class Way:
    """How a row is drawn: rows of one way are drawn together.

    Attributes:
        num_candidates: from so many sorted candidates; None is from the whole vocabulary.
        searches: the whole vocabulary is searched for a filter's limit, which others need not pay.
    """

    num_candidates: int | None
    searches: bool


def choose_way(sampling: Sampling, vocabulary_size: int) -> Way | None:
    """By the row's own settings alone, so that its tokens do not depend on its neighbours."""
    if is_greedy(sampling):
        return None
    top_k = _limit_top_k(sampling, vocabulary_size)
    for number in CANDIDATES:
        if top_k <= number and top_k < vocabulary_size:
            return Way(min(number, vocabulary_size), searches=False)
    return Way(None, searches=sampling.top_p < 1 or top_k < vocabulary_size)


def is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature < LOWEST_TEMPERATURE or sampling.top_k == 1


def _limit_top_k(sampling: Sampling, vocabulary_size: int) -> int:
    return min(sampling.top_k or vocabulary_size, vocabulary_size)


class Group:
    """Rows that are drawn from in the same way.

    Args:
        rows: their place in the batch.
        samplings: theirs.
        generators: their sources of random numbers.
        num_candidates: draw from so many sorted candidates; None draws from the whole vocabulary.
    """

    def __init__(
        self,
        rows: Subset,
        samplings: Sequence[Sampling],
        generators: Sequence[np.random.PCG64],
        num_candidates: int | None,
        vocabulary_size: int,
    ) -> None:
        self.rows = rows
        self._generators = generators
        self._num_candidates = num_candidates
        limits = [_limit_top_k(one, vocabulary_size) for one in samplings]
        # 2 ** x is several times faster than e ** x on a CPU.
        self._scale = column([LOG2_E / one.temperature for one in samplings])
        self._top_p = column([one.top_p for one in samplings])
        self._min_p = column([one.min_p for one in samplings])
        self._top_k = column(limits)
        self._has_top_p = any(one.top_p < 1 for one in samplings)
        self._has_min_p = any(one.min_p > 0 for one in samplings)
        self._has_top_k = min(limits) < vocabulary_size

    def draw(self, logits: mx.array) -> mx.array:
        """Token ids, int32 (rows,), from logits, float32 (rows, vocabulary)."""
        if self._num_candidates is None:
            return self._draw_from_all(logits)
        return self._draw_from_candidates(logits, self._num_candidates)

    def _draw_from_candidates(self, logits: mx.array, num_candidates: int) -> mx.array:
        import mlx.core as mx

        ids, logits = find_largest(logits, num_candidates)
        weights = mx.power(2.0, (logits - logits[:, :1]) * self._scale)
        rank = mx.arange(num_candidates)
        weights = mx.where((rank < self._top_k) & (weights >= self._min_p), weights, 0)
        if self._has_top_p:
            mass_before = mx.cumsum(weights, axis=-1) - weights
            limit = self._top_p * weights.sum(axis=-1, keepdims=True)
            is_kept = (self._top_p == 1) | (mass_before < limit) | (rank == 0)
            weights = mx.where(is_kept, weights, 0)
        place = self._draw_places(weights)
        return mx.take_along_axis(ids, place[:, None], axis=-1)[:, 0]

    def _draw_from_all(self, logits: mx.array) -> mx.array:
        import mlx.core as mx

        largest = logits.max(axis=-1, keepdims=True)
        weights = mx.power(2.0, (logits - largest) * self._scale)
        if self._has_min_p:  # the most likely token weighs 1
            weights = mx.where(weights >= self._min_p, weights, 0)
        if self._has_top_k:
            weights = mx.where(weights >= _find_top_k(weights, self._top_k), weights, 0)
        if self._has_top_p:
            limit = mx.where(self._top_p < 1, _find_top_p(weights, self._top_p), 0)
            weights = mx.where(weights >= limit, weights, 0)
        return self._draw_places(weights)

    def _draw_places(self, weights: mx.array) -> mx.array:
        """Column numbers, int32 (rows,), drawn by weight; one of weight 0 is never drawn."""
        import mlx.core as mx

        # In integers, a cumulative sum is exact and grows at every share above 0, and only there.
        shares = weights * (SUM_OF_SHARES / weights.sum(axis=-1, keepdims=True))
        cumulative = mx.cumsum(shares.astype(mx.int32), axis=-1)
        shift = 64 - UNIFORM_BITS
        uniform = [[generator.random_raw() >> shift] for generator in self._generators]
        total = cumulative[:, -1:].astype(mx.int64)
        passed = (mx.array(uniform, dtype=mx.int64) * total) >> UNIFORM_BITS
        places = (cumulative <= passed.astype(mx.int32)).sum(axis=-1)
        # Only logits with NaN or infinity come to the end without a token.
        return mx.minimum(places, weights.shape[-1] - 1).astype(mx.int32)


def find_largest(values: mx.array, number: int) -> tuple[mx.array, mx.array]:
    """Columns and values of the largest, in falling order: int32 and float (rows, number)."""
    import mlx.core as mx

    # A full sort of the vocabulary takes several times as long on a CPU.
    first = values.shape[-1] - number
    columns = mx.argpartition(values, first, axis=-1)[:, first:]
    largest = mx.take_along_axis(values, columns, axis=-1)
    order = mx.argsort(-largest, axis=-1)
    columns = mx.take_along_axis(columns, order, axis=-1).astype(mx.int32)
    return columns, mx.take_along_axis(largest, order, axis=-1)


def _find_top_k(weights: mx.array, top_k: mx.array) -> mx.array:
    """The `top_k`-th largest weight, (rows, 1), of weights from 0 to 1."""
    import mlx.core as mx

    def is_enough(limit: mx.array) -> mx.array:
        return (weights >= limit).sum(axis=-1, keepdims=True) >= top_k

    return _bisect(mx.zeros(top_k.shape), TOP_K_PASSES, is_enough)


def _find_top_p(weights: mx.array, top_p: mx.array) -> mx.array:
    """About the largest limit whose tokens have `top_p` of all weight, (rows, 1).

    The nucleus of Holtzman et al. (2020), without sorting. Weights are from 0 to 1.
    """
    total = weights.sum(axis=-1, keepdims=True)

    def is_enough(limit: mx.array) -> mx.array:
        return ((weights >= limit) * weights).sum(axis=-1, keepdims=True) >= top_p * total

    # All tokens below this together do not weigh what may be left out.
    low = (1 - top_p) * total / weights.shape[-1]
    return _bisect(low, TOP_P_PASSES, is_enough)


def _bisect(low: mx.array, num_passes: int, is_enough: Callable[[mx.array], mx.array]) -> mx.array:
    """About the largest limit from `low` to 1 that leaves enough; `low` itself is taken to do so.

    The halves are of the integers that float32 are stored as: their steps are relative.
    """
    import mlx.core as mx

    low = low.view(mx.int32)
    high = mx.full(low.shape, BITS_ABOVE_ONE, dtype=mx.int32)
    for _ in range(num_passes):
        middle = (low + high) >> 1
        leaves_enough = is_enough(middle.view(mx.float32))
        low = mx.where(leaves_enough, middle, low)
        high = mx.where(leaves_enough, high, middle)
    return low.view(mx.float32)
