"""Some rows of a batch: taken out, worked on, put back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mlops.engine.request import GenerationRequest

if TYPE_CHECKING:
    import mlx.core as mx


class Subset:
    """Some rows of a batch, in its order.

    Args:
        rows: their numbers, rising.
        num_rows: rows of the batch.
    """

    def __init__(self, rows: Sequence[int], num_rows: int) -> None:
        import mlx.core as mx

        # None: all of them, so that nothing needs to be copied.
        self._index = None if len(rows) == num_rows else mx.array(list(rows), dtype=mx.int32)

    @classmethod
    def choose(
        cls, rows: Sequence[GenerationRequest], is_wanted: Callable[[GenerationRequest], bool]
    ) -> Subset | None:
        """The rows that are wanted; None when there are none."""
        numbers = [number for number, row in enumerate(rows) if is_wanted(row)]
        return cls(numbers, len(rows)) if numbers else None

    def take(self, values: mx.array) -> mx.array:
        """The values (rows, ...) of these rows."""
        return values if self._index is None else values[self._index]

    def put(self, values: mx.array, own: mx.array) -> mx.array:
        """The values of all rows, with `own` in the place of these rows'."""
        if self._index is None:
            return own
        values = values[:]  # a new Python object: the caller's array stays as it is
        values[self._index] = own
        return values


def column(values: Sequence[float]) -> mx.array:
    """One number a row, float32 (rows, 1)."""
    import mlx.core as mx

    return mx.array(list(values), dtype=mx.float32)[:, None]
