"""Whether requests can share a model's forward pass: tried once at load, not assumed.

Some of mlx-lm's architectures have caches that cannot be batched; others fail on the mask that
prompts of different lengths need, or quietly compute something else with it. So the trial goes the
ways that the engine goes, and compares what each row gives with what it gives alone:

    three prompts prefilled together   of 2, 5 and 9 tokens, padded on the right
    they join, then two others         of 1 token, which needs no prefill, and of 64
    a step                             rows of five lengths, padded on the left
    four leave                         the one that stays takes another's place
    two prompts go on together         one from the state of a row that left, as the prefix cache
                                       keeps it, from 5 to 7 tokens; the other from 63 to 66
    they join, a step

A window of more than `WINDOW_TOKENS` is cut to so many for the trial, alone and together: to fill
one of 4,096 would take longer than to load the weights. What is not tried: more than five rows,
more than 67 tokens, adapters.

Six to eight forward passes. It is also the warm-up, since MLX compiles its kernels at first use.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlops.engine.finite import is_computable

if TYPE_CHECKING:
    import mlx.core as mx
    from mlx import nn

    from mlops.engine.kv import BatchCaches, CacheCost, Caches

    Prefill = Callable[[nn.Module, Sequence[Caches], Sequence[Sequence[int]]], list[Caches]]

logger = logging.getLogger(__name__)

SHORT = (3, 1, 4, 1, 5, 2, 6, 5)
LONG = tuple(1 + (7 * place * place + place // 3) % 6 for place in range(67))
WINDOW_TOKENS = 32

TOLERANCE = 1e-3
"""Of float32 on a CPU: rounding gives 1e-7 to 1e-5, what is wrong 2e-2 and more."""

NOISE_FACTOR = 4.0
LARGEST_TOLERANCE = 0.1

_Name = tuple[str, int]
"""A sequence and a position in it."""


@dataclass(frozen=True)
class Trial:
    """What a model showed when it computed for the first time.

    Attributes:
        can_batch: whether sequences give the same together as alone, step by step.
        can_prefill_together: whether prompts of different lengths do. Never without `can_batch`.
        num_logits: columns of its logits, at least as many as the tokenizer has tokens.
        cache_cost: what its caches take.
    """

    can_batch: bool
    can_prefill_together: bool
    num_logits: int
    cache_cost: CacheCost


@dataclass(frozen=True)
class _Alone:
    """What sequences give alone.

    Attributes:
        logits: (vocabulary,), by sequence and position.
        caches_of_long: of its first 63 tokens.
        cost: of the caches.
        tolerance: how far a row may be from this, as `_difference` measures it.
    """

    logits: dict[_Name, mx.array]
    caches_of_long: Caches
    cost: CacheCost
    tolerance: float


def try_out(model: nn.Module) -> Trial:
    """Compute a short and a long sequence with the model, alone and together.

    Raises:
        ArithmeticError: its logits are not finite.
        Exception: whatever mlx-lm raises for a model that cannot compute.
    """
    from mlops.engine.prefill import new_caches, prefill

    alone = _compute_alone(model)
    can_merge = all(map(_can_merge, new_caches(model)))
    together = can_merge and _is_same(model, alone, prefill)
    can_batch = together or (can_merge and _is_same(model, alone, _prefill_each))
    num_logits = next(iter(alone.logits.values())).shape[-1]
    return Trial(can_batch, together, num_logits, alone.cost)


def _compute_alone(model: nn.Module) -> _Alone:
    import mlx.core as mx

    from mlops.engine.kv import can_cut, cut, fork, measure_cost
    from mlops.engine.prefill import new_caches

    caches = new_caches(model)
    of_short = _logits(model, [SHORT], caches)
    cost = measure_cost(caches, len(SHORT))
    caches, is_cut = _new_caches(model)
    if can_cut(caches):  # one pass less
        of_long = [_logits(model, [LONG], caches)]
        kept = cut(caches, 63)
    else:
        of_long = [_logits(model, [LONG[:63]], caches)]
        kept = [fork(cache) for cache in caches]
        # Where a window is cut, pieces make a difference: here they are those of the batch.
        pieces = (LONG[63:66], LONG[66:]) if is_cut else (LONG[63:],)
        of_long += [_logits(model, [piece], caches) for piece in pieces]
    if not all(is_computable(one).item() for one in (of_short, *of_long)):
        raise ArithmeticError("its logits are not finite")
    logits = {("short", place): row for place, row in enumerate(of_short[0])}
    for place, row in enumerate(mx.concatenate(of_long, axis=1)[0]):
        logits["long", place] = row
    return _Alone(logits, kept, cost, _find_tolerance(model, logits))


def rounding_tolerance(dtype: mx.Dtype, num_layers: int) -> float:
    """How far two ways to compute the same may be apart, as a part of how far values are spread.

    In float32 on a CPU, `TOLERANCE`. Other types round more, and GPUs may compute float32 products
    in less: there each layer adds an error of the type's epsilon (that of float16 for float32 on a
    GPU), and as the layers' errors are independent, they add up to its multiple by the square root
    of their number; twice that is still rounding.
    """
    import mlx.core as mx

    if dtype == mx.float32 and mx.default_device() == mx.cpu:
        return TOLERANCE
    epsilon = float(mx.finfo(mx.float16 if dtype == mx.float32 else dtype).eps)
    return min(LARGEST_TOLERANCE, max(TOLERANCE, 2 * epsilon * math.sqrt(max(1, num_layers))))


def _find_tolerance(model: nn.Module, logits: dict[_Name, mx.array]) -> float:
    """How far a row of a batch may be from what it gives alone.

    Where rounding shows (see `rounding_tolerance`) it is at least a multiple of what the same
    tokens differ by, alone, when they are computed in other pieces: other pieces are other shapes,
    so other kernels and orders of summation, as a batch is. That counts in what a model makes of
    rounding, such as another expert that is chosen.
    """
    caches, _ = _new_caches(model)
    tolerance = rounding_tolerance(logits["long", 0].dtype, len(caches))
    if tolerance <= TOLERANCE:
        return tolerance
    _logits(model, [LONG[:8]], caches)
    noise = [
        _difference(_logits(model, [LONG[place : place + 1]], caches)[0, -1], logits["long", place])
        for place in (8, 9)
    ]
    return min(LARGEST_TOLERANCE, max(tolerance, NOISE_FACTOR * max(noise)))


def _is_same(model: nn.Module, alone: _Alone, prefill: Prefill) -> bool:
    how = "each prompt on its own" if prefill is _prefill_each else "prompts together"
    try:
        together = _compute_together(model, alone.caches_of_long, prefill)
    except Exception as exc:  # whatever fails here would fail the requests of a batch
        logger.info("batching with %s fails: %s", how, exc)
        return False
    for step, (sequence, place), row in together:
        difference = _difference(row, alone.logits[sequence, place])
        if not difference <= alone.tolerance:  # NaN is none
            logger.info(
                "batching with %s gives something else in step %d for the row of %d tokens: its "
                "logits are %.2g of their standard deviation off, at most %.2g may be rounding",
                *(how, step, place + 1, difference, alone.tolerance),
            )
            return False
    return True


def _compute_together(
    model: nn.Module, of_long: Caches, prefill: Prefill
) -> list[tuple[int, _Name, mx.array]]:
    """The number of a step, whose logits, and the logits: for each row of each step."""
    from mlops.engine.kv import BatchCaches, fork

    found: list[tuple[int, _Name, mx.array]] = []
    batch = BatchCaches(max_rows=5)

    def step(*rows: _Name) -> None:
        number = len({one for one, _, _ in found}) + 1
        tokens = [(SHORT if sequence == "short" else LONG)[place] for sequence, place in rows]
        logits = _step(model, batch, tokens)
        found.extend((number, name, logits[row]) for row, name in enumerate(rows))

    empty = [_new_caches(model)[0] for _ in range(4)]
    batch.join(prefill(model, empty[:3], [SHORT[:1], SHORT[:4], LONG[:8]]))
    batch.join([empty[3]])
    batch.join([[fork(cache) for cache in of_long]])
    step(("short", 1), ("short", 4), ("long", 8), ("short", 0), ("long", 63))
    left = batch.take(1)
    batch.leave([0, 1, 3, 4])
    begun = [left, [fork(cache) for cache in of_long]]
    batch.join(prefill(model, begun, [SHORT[5:7], LONG[63:66]]))
    step(("long", 9), ("short", 7), ("long", 66))
    return found


def _step(model: nn.Module, batch: BatchCaches, tokens: Sequence[int]) -> mx.array:
    """The logits of a decode step, (rows, vocabulary)."""
    batch.prepare_step()
    logits = _logits(model, [[token] for token in tokens], batch.layers)
    batch.end_step()
    return logits[:, -1]


def _prefill_each(
    model: nn.Module, caches: Sequence[Caches], tokens: Sequence[Sequence[int]]
) -> list[Caches]:
    from mlops.engine.prefill import prefill

    return [prefill(model, [of_one], [ids])[0] for of_one, ids in zip(caches, tokens, strict=True)]


def _new_caches(model: nn.Module) -> tuple[Caches, bool]:
    """Empty caches with windows that the trial's sequences fill; whether one had to be cut."""
    from mlops.engine.kv import flatten
    from mlops.engine.mlx_lm import RotatingKVCache
    from mlops.engine.prefill import new_caches

    caches = new_caches(model)
    large = [
        cache
        for cache in flatten(caches)
        if isinstance(cache, RotatingKVCache) and cache.max_size > WINDOW_TOKENS
    ]
    for cache in large:
        cache.max_size = WINDOW_TOKENS
    return caches, bool(large)


def _can_merge(cache: Any) -> bool:
    return hasattr(cache, "merge") and all(map(_can_merge, getattr(cache, "caches", ())))


def _difference(one: mx.array, other: mx.array) -> float:
    """Root mean square of what two rows of logits differ by, in standard deviations of the other.

    Of those that are not minus infinity, which a model gives the tokens that it never says.
    """
    import mlx.core as mx

    one, other = one.astype(mx.float32), other.astype(mx.float32)
    is_said = other > -mx.inf
    num_said = is_said.sum()
    mean = mx.where(is_said, other, 0.0).sum() / num_said
    spread = mx.where(is_said, other - mean, 0.0).square().sum()
    error = mx.where(is_said, one - other, 0.0).square().sum()
    ratio: Any = mx.sqrt(error / mx.maximum(spread, 1e-30)).item()
    return float(ratio)


def _logits(model: nn.Module, tokens: Sequence[Sequence[int]], caches: list[Any]) -> mx.array:
    """Logits of all positions, (rows, positions, vocabulary)."""
    import mlx.core as mx

    logits: mx.array = model(mx.array([list(row) for row in tokens]), cache=caches)
    mx.eval(logits, [cache.state for cache in caches if not cache.empty()])
    return logits
