"""What attention remembers: the KV rectangle of a decode batch, and the state of single sequences.

A sequence's prompt is computed into caches of its own (mlx-lm's, one per layer). When it joins the
decode batch, they are copied into a row there; when it leaves, the last row moves into its place.
Neither reallocates anything:

    columns   start          end
              |  . . a a a a |      rows are right-aligned at `end`, where all of them write next;
              |  b b b b b b |      `start` is the left end of the longest row
              |  . . . . c c |

Plain attention (`KVCache`) has this rectangle. Other kinds of caches (sliding windows, state-space
models, mixtures of them) use mlx-lm's own batch classes.
"""

# mypy: disable-error-code="misc"
# mlx-lm has no types.

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlops.engine.mlx_lm import (
    BatchKVCache,
    CacheList,
    KVCache,
    RotatingKVCache,
    create_causal_mask,
)

GROWTH_TOKENS = 256
"""Columns that a full rectangle grows by, at least."""

SPARE_TOKENS = 64
"""Columns left free before the longest row: so much longer may the next one be that joins."""

Caches = list[Any]
"""One cache per layer, of one sequence or of a batch."""


class Columns:
    """Where each row of the rectangles of all layers begins; the same for every layer.

    Attributes:
        lefts: first column of each row.
        end: the column that the next token is written to.
        row_capacity, column_capacity: size of the rectangles.
    """

    def __init__(self) -> None:
        self.lefts: list[int] = []
        self.end = 0
        self.row_capacity = 0
        self.column_capacity = 0
        self._memo: dict[Any, Any] = {}
        self._lefts_array: mx.array | None = None

    @property
    def start(self) -> int:
        """First column of the longest row."""
        return min(self.lefts, default=self.end)

    @property
    def is_rectangular(self) -> bool:
        """True when all rows are equally long, so that nothing needs a mask."""
        return self.start == max(self.lefts, default=self.end)

    def changed(self) -> None:
        """Call after a change of `lefts`."""
        self._memo.clear()
        self._lefts_array = None

    def offsets(self, end: int) -> mx.array | int:
        """Position of the token in column `end`, (rows,), or one number for all rows."""
        if self.is_rectangular:
            return end - self.start
        return self._remember(("offsets", end), lambda: end - self._lefts())  # type: ignore[no-any-return]

    def mask(
        self, end: int, num_tokens: int, window_size: int | None, return_array: bool
    ) -> mx.array | None:
        """What each row may attend to, (rows, 1, num_tokens, columns); None is everything."""
        num_columns = end + num_tokens - self.start
        is_cut = window_size is not None and window_size < num_columns
        if num_tokens == 1 and self.is_rectangular and not is_cut and not return_array:
            return None
        key = ("mask", end, num_tokens, window_size if is_cut else None)
        if num_tokens == 1 and not is_cut:
            return self._remember(  # type: ignore[no-any-return]
                key,
                lambda: mx.arange(self.start, end + 1) >= mx.expand_dims(self._lefts(), (1, 2, 3)),
            )
        return self._remember(  # type: ignore[no-any-return]
            key,
            lambda: create_causal_mask(
                num_tokens,
                offset=end - self.start,
                left_padding=self._lefts() - self.start,
                window_size=window_size,
            ),
        )

    def _lefts(self) -> mx.array:
        if self._lefts_array is None:
            self._lefts_array = mx.array(self.lefts, dtype=mx.int32)
        return self._lefts_array

    def _remember(self, key: Any, compute: Any) -> Any:
        """What all layers of a step ask for is computed once."""
        if key not in self._memo:
            if len(self._memo) >= 4:  # the steps before
                self._memo.clear()
            self._memo[key] = compute()
        return self._memo[key]


class RowKVCache(BatchKVCache):
    """One layer's rectangle, (row capacity, heads, columns, head size). Models see its rows only.

    It keeps to the contract of mlx-lm's `BatchKVCache`: `offset`, `make_mask`, `update_and_fetch`.
    """

    def __init__(self, columns: Columns) -> None:  # BatchKVCache's own would make arrays
        self.keys: Any = None
        self.values: Any = None
        self._columns = columns
        self._idx = columns.end
        self._right_padding = None

    @property
    def offset(self) -> mx.array | int:
        return self._columns.offsets(self._idx)

    @property
    def left_padding(self) -> mx.array:
        return self._columns._lefts() - self._columns.start

    def make_mask(
        self,
        N: int,  # noqa: N803 - mlx-lm's name
        return_array: bool = False,
        window_size: int | None = None,
        **_: Any,
    ) -> mx.array | None:
        return self._columns.mask(self._idx, N, window_size, return_array)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        rows, _, num_tokens, _ = keys.shape
        end = self._idx + num_tokens
        if self.keys is None:
            self.allocate(keys, values)
        self.keys[:rows, :, self._idx : end] = keys
        self.values[:rows, :, self._idx : end] = values
        self._idx = end
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        rows, start = len(self._columns.lefts), self._columns.start
        return self.keys[:rows, :, start : self._idx], self.values[:rows, :, start : self._idx]

    def allocate(self, keys: mx.array, values: mx.array, shift: int = 0) -> None:
        """Make a rectangle for states like these; what is there moves `shift` columns right."""
        start, end = self._columns.start, self._idx
        num_rows, num_columns = self._columns.row_capacity, self._columns.column_capacity
        for name, like in (("keys", keys), ("values", values)):
            old = getattr(self, name)
            new = mx.zeros((num_rows, like.shape[1], num_columns, like.shape[3]), like.dtype)
            if old is not None and start < end:
                rows = min(num_rows, old.shape[0])
                new[:rows, :, start + shift : end + shift] = old[:rows, :, start:end]
            setattr(self, name, new)

    def shift(self, num_columns: int) -> None:
        """Move everything so many columns right, into a rectangle of the present capacity."""
        if self.keys is not None:
            self.allocate(self.keys, self.values, num_columns)
        self._idx += num_columns

    def put(self, row: int, keys: mx.array | None, values: mx.array | None, left: int) -> None:
        """Write a sequence's state, (1, heads, tokens, head size), into a row; None is no token."""
        if keys is not None and values is not None:
            self.keys[row : row + 1, :, left : self._idx] = keys
            self.values[row : row + 1, :, left : self._idx] = values
        start = self._columns.start
        if start < left and self.keys is not None:
            # Masked, and still multiplied with 0: what an earlier row left there may be infinite.
            self.keys[row : row + 1, :, start:left] = 0
            self.values[row : row + 1, :, start:left] = 0

    def clear(self, first: int, last: int) -> None:
        """Zero the columns from `first` up to `last` of all rows."""
        if self.keys is not None and first < last:
            self.keys[:, :, first:last] = 0
            self.values[:, :, first:last] = 0

    def copy(self, row: int) -> list[mx.array]:
        """One row's columns, of keys and of values, to be given to `overwrite`."""
        if self.keys is None:
            return []
        start, end = self._columns.start, self._idx
        return [mx.contiguous(of_all[row : row + 1, :, start:end]) for of_all in self._arrays()]

    def overwrite(self, row: int, copies: Sequence[mx.array]) -> None:
        """Put what `copy` gave into another row."""
        start, end = self._columns.start, self._idx
        for of_all, of_row in zip(self._arrays(), copies, strict=False):
            of_all[row : row + 1, :, start:end] = of_row

    def _arrays(self) -> tuple[Any, Any]:
        return self.keys, self.values

    def take(self, row: int) -> KVCache:
        """A copy of one row's state as a cache of its own."""
        single = KVCache()
        if self.keys is not None:
            left = self._columns.lefts[row]
            single.keys = mx.contiguous(self.keys[row : row + 1, :, left : self._idx])
            single.values = mx.contiguous(self.values[row : row + 1, :, left : self._idx])
            single.offset = self._idx - left
        return single


class BatchCaches:
    """The caches of a decode batch: one per layer, rows in the order of the batch.

    Args:
        max_rows: the most rows there will ever be.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._columns = Columns()
        self.layers: Caches = []

    @property
    def num_rows(self) -> int:
        """Rows in use."""
        return len(self._columns.lefts)

    @property
    def num_bytes(self) -> int:
        """Bytes that the caches hold."""
        return sum(layer.nbytes for layer in self.layers)

    def join(self, sequences: Sequence[Caches]) -> None:
        """Append rows: each sequence's caches, one per layer, are copied in."""
        lengths = [_num_tokens(caches) for caches in sequences]
        self._make_room(len(sequences), max(lengths))
        first_row, end, start = self.num_rows, self._columns.end, self._columns.start
        self._columns.lefts += [end - length for length in lengths]
        self._columns.changed()
        if first_row > 0:  # the rows that were there become wider
            for layer in self._rectangles():
                layer.clear(self._columns.start, start)
        is_new = not self.layers
        for number, singles in enumerate(zip(*sequences, strict=True)):
            if type(singles[0]) is KVCache:
                layer = RowKVCache(self._columns) if is_new else self.layers[number]
                self._join_rectangle(layer, singles, first_row, end)
            else:
                # One by one: merging several fails where one of them is empty.
                merged = [type(single).merge([fork(single)]) for single in singles]
                layer = merged.pop(0) if is_new else self.layers[number]
                for other in merged:
                    layer.extend(other)
            if is_new:
                self.layers.append(layer)

    def leave(self, rows: Sequence[int]) -> list[int]:
        """Remove rows; gives for each row that remains which one it was."""
        if len(rows) == self.num_rows:
            self._empty()
            return []
        order = list(range(self.num_rows))
        for row in sorted(rows, reverse=True):
            order[row] = order[-1]
            order.pop()
        moved = [row for row, source in enumerate(order) if row != source]
        copies = [[layer.copy(order[row]) for row in moved] for layer in self._rectangles()]
        # Now: a rectangle that a copy still waits for would itself be copied by the next write.
        mx.eval(copies)
        for layer, of_layer in zip(self._rectangles(), copies, strict=True):
            for row, of_row in zip(moved, of_layer, strict=True):
                layer.overwrite(row, of_row)
        self._columns.lefts = [self._columns.lefts[source] for source in order]
        self._columns.changed()
        for layer in self.layers:
            if not isinstance(layer, RowKVCache):
                layer.filter(order)
        return order

    def release(self) -> None:
        """Give the memory back; there are no rows."""
        self.layers = []
        self._columns = Columns()

    def _empty(self) -> None:
        """Forget all rows; rectangles stay for the next ones, until `release`."""
        columns = self._columns
        columns.lefts = []
        columns.end = max(0, columns.column_capacity - GROWTH_TOKENS)
        columns.changed()
        if any(not isinstance(layer, RowKVCache) for layer in self.layers):
            self.release()

    def take(self, row: int) -> Caches:
        """A copy of one row's state: caches as of a single sequence."""
        return [
            layer.take(row) if isinstance(layer, RowKVCache) else layer.extract(row)
            for layer in self.layers
        ]

    def prepare_step(self) -> None:
        """Call before the forward pass of a step: makes sure that there is a column to write to."""
        self._make_room(0, 0)

    def end_step(self) -> None:
        """Call after the forward pass of a step."""
        self._columns.end += 1
        for layer in self._rectangles():
            layer._idx = self._columns.end

    def arrays(self) -> list[Any]:
        """All arrays of the caches, to evaluate them."""
        return [
            (layer.keys, layer.values) if isinstance(layer, RowKVCache) else layer.state
            for layer in self.layers
            if not layer.empty()
        ]

    def _rectangles(self) -> list[RowKVCache]:
        return [layer for layer in self.layers if isinstance(layer, RowKVCache)]

    def _join_rectangle(
        self, layer: RowKVCache, singles: Sequence[KVCache], first_row: int, end: int
    ) -> None:
        layer._idx = end
        if layer.keys is None:
            like = next((single for single in singles if single.keys is not None), None)
            if like is not None:
                layer.allocate(like.keys, like.values)
        for row, single in enumerate(singles, first_row):
            keys, values = (None, None) if single.keys is None else single.keys_and_values()
            layer.put(row, keys, values, self._columns.lefts[row])

    def _make_room(self, num_new: int, longest: int) -> None:
        """Grow or shift the rectangles when rows, a row's length or the next token do not fit."""
        columns = self._columns
        num_rows = self.num_rows + num_new
        if (
            num_rows <= columns.row_capacity
            and longest <= columns.end
            and columns.end < columns.column_capacity
        ):
            return
        if num_rows > columns.row_capacity:
            columns.row_capacity = max(num_rows, min(4 * columns.row_capacity, self._max_rows))
        width = max(columns.end - columns.start, longest)
        columns.column_capacity = SPARE_TOKENS + width + max(GROWTH_TOKENS, width // 4)
        shift = SPARE_TOKENS + width - columns.end
        for layer in self._rectangles():
            layer._idx = columns.end
            layer.shift(shift)
        columns.lefts = [left + shift for left in columns.lefts]
        columns.end += shift
        columns.changed()


class SingleCaches:
    """`BatchCaches` for a model that cannot batch: one row, whose caches are used as they are."""

    def __init__(self) -> None:
        self.layers: Caches = []

    @property
    def num_bytes(self) -> int:
        """Bytes that the caches hold."""
        return sum(layer.nbytes for layer in self.layers)

    def join(self, sequences: Sequence[Caches]) -> None:
        """Take the caches of the one sequence."""
        (self.layers,) = sequences

    def leave(self, rows: Sequence[int]) -> list[int]:
        """Drop the caches."""
        self.release()
        return []

    def release(self) -> None:
        """Give the memory back; there is no row."""
        self.layers = []

    def take(self, row: int) -> Caches:
        """A copy of the state; `row` is 0."""
        return compact(self.layers)

    def prepare_step(self) -> None:
        """There is always room."""

    def end_step(self) -> None:
        """mlx-lm's caches count for themselves."""

    def arrays(self) -> list[Any]:
        """All arrays of the caches, to evaluate them."""
        return [layer.state for layer in self.layers if not layer.empty()]


@dataclass(frozen=True)
class CacheCost:
    """What a sequence's caches take: per token, per token up to a window, and whatever its length.

    Attributes:
        per_token: bytes for each token.
        windows: (tokens, bytes per token) of each sliding window.
        fixed: bytes of states that do not grow.
    """

    per_token: int
    windows: tuple[tuple[int, int], ...]
    fixed: int

    def num_bytes(self, num_tokens: int) -> int:
        """Bytes of one row of `num_tokens`."""
        in_windows = sum(min(num_tokens, size) * each for size, each in self.windows)
        return num_tokens * self.per_token + in_windows + self.fixed


def measure_cost(caches: Caches, num_tokens: int) -> CacheCost:
    """The cost per token, from the caches of a sequence of `num_tokens`."""
    per_token, fixed = 0, 0
    windows = []
    for cache in flatten(caches):
        if type(cache) is KVCache or isinstance(cache, RotatingKVCache):
            if cache.keys is None:
                continue
            each = sum(
                array.shape[1] * array.shape[3] * array.itemsize
                for array in (cache.keys, cache.values)
            )
            if isinstance(cache, RotatingKVCache):
                windows.append((int(cache.max_size), each))
            else:
                per_token += each
        elif hasattr(cache, "offset"):
            per_token += cache.nbytes // max(1, num_tokens)
        else:
            fixed += cache.nbytes
    return CacheCost(per_token, tuple(windows), fixed)


def can_cut(caches: Caches) -> bool:
    """True when a prefix of the sequence's tokens can be had from its caches."""
    return all(type(cache) is KVCache for cache in caches)


def fork(cache: Any) -> Any:
    """A cache that goes on from here and leaves this one as it is; they share memory until then."""
    other = copy.copy(cache)
    if isinstance(cache, CacheList):
        other.caches = tuple(fork(one) for one in cache.caches)
    elif isinstance(getattr(cache, "cache", None), list):
        other.cache = list(cache.cache)
    elif getattr(cache, "keys", None) is not None:
        # Array objects of its own: mlx-lm's caches assign into theirs.
        other.keys, other.values = cache.keys[...], cache.values[...]
    return other


def cut(caches: Caches, num_tokens: int) -> Caches:
    """The state after the first `num_tokens` tokens, as caches that can go on from there.

    Args:
        num_tokens: all tokens that the caches hold, unless `can_cut`.
    """
    forks = [fork(cache) for cache in caches]
    for cache in forks:
        if type(cache) is KVCache and cache.offset != num_tokens:
            cache.keys = cache.keys[..., :num_tokens, :]
            cache.values = cache.values[..., :num_tokens, :]
            cache.offset = num_tokens
    return forks


def compact(caches: Caches) -> Caches:
    """A copy without spare columns, to be kept."""
    kept = [fork(cache) for cache in caches]
    for cache in kept:
        if type(cache) is KVCache and cache.keys is not None:
            keys, values = cache.keys_and_values()
            cache.keys, cache.values = mx.contiguous(keys), mx.contiguous(values)
    return kept


def begin_computing(caches: Iterable[Caches]) -> None:
    """Begin to compute the states of sequences, without waiting for them."""
    mx.async_eval(_states(caches))  # type: ignore[no-untyped-call]


def compute(caches: Iterable[Caches]) -> None:
    """Compute the states of sequences."""
    mx.eval(_states(caches))


def _states(caches: Iterable[Caches]) -> list[Any]:
    return [cache.state for of_one in caches for cache in of_one if not cache.empty()]


def _num_tokens(caches: Caches) -> int:
    return max((int(cache.offset) for cache in caches if type(cache) is KVCache), default=0)


def flatten(caches: Sequence[Any]) -> list[Any]:
    """All caches, those in mlx-lm's lists of caches among them."""
    flat = []
    for cache in caches:
        flat += flatten(cache.caches) if isinstance(cache, CacheList) else [cache]
    return flat
