"""What requests add to the model's logits and take off: bias and penalties.

The order is vLLM's: bias, repetition penalty, frequency and presence penalty. The counts of drawn
tokens stay on the device, where a step's tokens are before the host knows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mlops.engine.request import GenerationRequest
from mlops.engine.subset import Subset, column

if TYPE_CHECKING:
    import mlx.core as mx

LOWEST_REPETITION_PENALTY = 1e-6
"""A smaller one does the same, until float32 divides by zero."""


class Adjustments:
    """The bias and the penalties of a batch's rows, which come and go as in `BatchSampler`."""

    def __init__(self, vocabulary_size: int) -> None:
        self._vocabulary_size = vocabulary_size
        self._rows: list[GenerationRequest] = []
        self._all_counts = _TokenCounts(vocabulary_size)
        self._answer_counts = _TokenCounts(vocabulary_size)
        self._prepare()

    def add(self, rows: Sequence[GenerationRequest]) -> None:
        """Append rows that have drawn nothing yet."""
        self._all_counts.add([row.prompt if _repeats(row) else None for row in rows])
        self._answer_counts.add([() if _is_additive(row) else None for row in rows])
        self._rows += rows
        self._prepare()

    def keep(self, rows: Sequence[int]) -> None:
        """Make row i what row `rows[i]` was."""
        self._all_counts.keep(rows)
        self._answer_counts.keep(rows)
        self._rows = [self._rows[row] for row in rows]
        self._prepare()

    def apply(self, logits: mx.array) -> mx.array:
        """Logits (rows, vocabulary) with bias and penalties; the same array when there are none."""
        import mlx.core as mx

        if self._bias is not None:
            rows, tokens, values = self._bias
            logits = logits.astype(mx.float32).at[rows, tokens].add(values)
        if self._repeating is not None and self._all_counts.table is not None:
            some = self._repeating.take(logits).astype(mx.float32)
            some = penalise_repetition(some, self._all_counts.table, self._repetition)
            logits = self._repeating.put(logits.astype(mx.float32), some)
        if self._additive is not None and self._answer_counts.table is not None:
            counts = self._answer_counts.table
            some = self._additive.take(logits).astype(mx.float32)
            # OpenAI's formula: platform.openai.com/docs/advanced-usage, "Parameter details".
            some = some - counts * self._frequency - (counts > 0) * self._presence
            logits = self._additive.put(logits.astype(mx.float32), some)
        return logits

    def count(self, tokens: mx.array) -> None:
        """Count the tokens just drawn, int32 (rows,)."""
        if self._repeating is not None:
            self._all_counts.count(self._repeating.take(tokens))
        if self._additive is not None:
            self._answer_counts.count(self._additive.take(tokens))

    def _prepare(self) -> None:
        """Build what every step needs, once for the rows that there are."""
        self._bias = _read_bias(self._rows, self._vocabulary_size)
        self._repeating = Subset.choose(self._rows, _repeats)
        self._additive = Subset.choose(self._rows, _is_additive)
        repeating = [row.sampling for row in self._rows if _repeats(row)]
        additive = [row.sampling for row in self._rows if _is_additive(row)]
        self._repetition = column(
            [max(one.repetition_penalty, LOWEST_REPETITION_PENALTY) for one in repeating]
        )
        self._frequency = column([one.frequency_penalty for one in additive])
        self._presence = column([one.presence_penalty for one in additive])


def penalise_repetition(logits: mx.array, counts: mx.array, penalty: mx.array) -> mx.array:
    """The penalty of Keskar et al. (2019), as Transformers and vLLM apply it.

    The logit of a token that occurred is divided by the penalty when it is above 0, and otherwise
    multiplied with it.

    Args:
        logits: float32 (rows, vocabulary).
        counts: of the tokens of prompt and answer, (rows, vocabulary).
        penalty: float32 (rows, 1).
    """
    import mlx.core as mx

    penalty = mx.where(counts > 0, penalty, 1)
    return mx.where(logits > 0, logits / penalty, logits * penalty)


class _TokenCounts:
    """How often each token has occurred, for the rows that need to know.

    Attributes:
        table: float32 (those rows, vocabulary), in the batch's order; None when there are none.
    """

    def __init__(self, vocabulary_size: int) -> None:
        self.table: mx.array | None = None
        self._vocabulary_size = vocabulary_size
        self._has_counts: list[bool] = []

    def add(self, rows: Sequence[Sequence[int] | None]) -> None:
        """Append rows with the tokens that each begins with; None is a row without counts."""
        import mlx.core as mx

        counted = [tokens for tokens in rows if tokens is not None]
        self._has_counts += [tokens is not None for tokens in rows]
        if not counted:
            return
        new = np.zeros((len(counted), self._vocabulary_size), dtype=np.float32)
        for counts, tokens in zip(new, counted, strict=True):
            ids = np.asarray(tokens, dtype=np.int64)
            np.add.at(counts, ids[ids < self._vocabulary_size], 1)
        table = mx.array(new)
        self.table = table if self.table is None else mx.concatenate([self.table, table])

    def keep(self, rows: Sequence[int]) -> None:
        """As `BatchSampler.keep`."""
        import mlx.core as mx

        places = np.cumsum(self._has_counts) - 1
        kept = [int(places[row]) for row in rows if self._has_counts[row]]
        self._has_counts = [self._has_counts[row] for row in rows]
        if self.table is not None:
            self.table = self.table[mx.array(kept, dtype=mx.int32)] if kept else None

    def count(self, tokens: mx.array) -> None:
        """Count one more token for each row of the table; int32 (its rows,)."""
        import mlx.core as mx

        if self.table is not None:
            self.table = self.table.at[mx.arange(tokens.size), tokens].add(1)


def _repeats(row: GenerationRequest) -> bool:
    return row.sampling.repetition_penalty != 1


def _is_additive(row: GenerationRequest) -> bool:
    return row.sampling.presence_penalty != 0 or row.sampling.frequency_penalty != 0


def _read_bias(
    rows: Sequence[GenerationRequest], vocabulary_size: int
) -> tuple[mx.array, mx.array, mx.array] | None:
    """Row, token and value of every bias; None when there is none."""
    import mlx.core as mx

    entries = [
        (number, token, value)
        for number, row in enumerate(rows)
        for token, value in row.sampling.logit_bias
        if token < vocabulary_size  # MLX would write beyond the array
    ]
    if not entries:
        return None
    numbers, tokens, values = zip(*entries, strict=True)
    return mx.array(numbers), mx.array(tokens), mx.array(values, dtype=mx.float32)
