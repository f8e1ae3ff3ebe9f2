"""Whether requests can share a model's forward pass: tried once at load, not assumed.

Some of mlx-lm's architectures have caches that cannot be batched; others fail on the mask that
prompts of different lengths need, or quietly compute something else with it. The trial does what a
decode batch does: a request runs, a longer one joins it, the first one leaves. It is also the
warm-up: MLX compiles its kernels at first use.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx
    from mlx import nn

    from mlops.engine.kv import CacheCost

logger = logging.getLogger(__name__)

PROMPTS = ((1, 2, 3), (4, 5, 6, 1, 2, 3))
NEXT_TOKENS = ((4,), (2,))
TOLERANCE = 0.05
"""Of the spread of a row's logits: rounding stays far below, a wrong mask does not."""


@dataclass(frozen=True)
class Trial:
    """What a model showed when it computed for the first time.

    Attributes:
        can_batch: whether two sequences give the same together as alone.
        num_logits: columns of its logits, at least as many as the tokenizer has tokens.
        cache_cost: what its caches take.
    """

    can_batch: bool
    num_logits: int
    cache_cost: CacheCost


def try_out(model: nn.Module) -> Trial:
    """Compute two short prompts with the model, alone and together."""
    from mlops.engine.kv import measure_cost
    from mlops.engine.prefill import new_caches

    alone, caches = [], new_caches(model)
    for prompt, more in zip(PROMPTS, NEXT_TOKENS, strict=True):
        caches = new_caches(model)
        model(_row(prompt[:-1]), cache=caches)
        alone.append([_logits(model, _row((token,)), caches)[0] for token in (prompt[-1], *more)])
    cost = measure_cost(caches, len(PROMPTS[-1]) + 1)
    return Trial(_is_same_together(model, alone), alone[0][0].shape[-1], cost)


def _is_same_together(model: nn.Module, alone: list[list[mx.array]]) -> bool:
    from mlops.engine.prefill import new_caches

    if not all(map(_can_merge, new_caches(model))):
        return False
    try:
        together = _decode_together(model)
    except Exception as exc:  # whatever fails here would fail the requests of a batch
        logger.info("two prompts in one batch fail: %s", exc)
        return False
    if all(map(_is_close, together, [*alone[0], *alone[1]])):
        return True
    logger.info("two prompts in one batch give other results than alone")
    return False


def _decode_together(model: nn.Module) -> list[mx.array]:
    """Logits of the first prompt's steps, then of the second's."""
    from mlops.engine.kv import BatchCaches
    from mlops.engine.prefill import new_caches, prefill

    empty = [new_caches(model) for _ in PROMPTS]
    short, long = prefill(model, empty, [prompt[:-1] for prompt in PROMPTS])
    batch = BatchCaches(max_rows=2)

    def step(*tokens: int) -> mx.array:
        batch.prepare_step()
        logits = _logits(model, _column(tokens), batch.layers)
        batch.end_step()
        return logits

    batch.join([short])
    first = step(PROMPTS[0][-1])
    batch.join([long])
    both = step(NEXT_TOKENS[0][0], PROMPTS[1][-1])
    batch.leave([0])
    last = step(NEXT_TOKENS[1][0])
    return [first[0], both[0], both[1], last[0]]


def _can_merge(cache: Any) -> bool:
    return hasattr(cache, "merge") and all(map(_can_merge, getattr(cache, "caches", ())))


def _is_close(one: mx.array, other: mx.array) -> bool:
    import mlx.core as mx

    is_close = mx.abs(one - other).max() <= TOLERANCE * (other.max() - other.min())
    return bool(is_close.item())  # False when it is NaN


def _logits(model: nn.Module, tokens: mx.array, caches: list[Any]) -> mx.array:
    """Logits of the last position, float32 (rows, vocabulary)."""
    import mlx.core as mx

    logits: mx.array = model(tokens, cache=caches)[:, -1, :].astype(mx.float32)
    mx.eval(logits, [cache.state for cache in caches if not cache.empty()])
    return logits


def _row(tokens: Sequence[int]) -> mx.array:
    import mlx.core as mx

    return mx.array([list(tokens)])


def _column(tokens: Sequence[int]) -> mx.array:
    import mlx.core as mx

    return mx.array(list(tokens))[:, None]
