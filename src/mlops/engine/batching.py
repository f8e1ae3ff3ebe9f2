"""Whether requests can share a model's forward pass: tried once at load, not assumed.

Some of mlx-lm's architectures have caches that cannot be batched; others fail on the mask that
prompts of different lengths need, or quietly compute something else with it. The trial is also the
warm-up: MLX compiles its kernels at first use.
"""

from __future__ import annotations

import logging
from contextlib import closing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx
    from mlx import nn

logger = logging.getLogger(__name__)

TRIAL_PROMPTS = ((1, 2, 3), (4, 5, 6, 1, 2, 3))
TOLERANCE = 0.05
"""Of the spread of a row's log-probabilities: rounding stays far below, a wrong mask does not."""


def can_batch(model: nn.Module) -> bool:
    """True when two prompts of different lengths give the same together as alone."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    if not all(map(_can_merge, make_prompt_cache(model))):
        return False
    alone = [_first_logprobs_alone(model, prompt) for prompt in TRIAL_PROMPTS]
    try:
        together = _first_logprobs_together(model)
    except Exception as exc:  # whatever fails here would fail the requests of a batch
        logger.info("two prompts in one batch fail: %s", exc)
        return False
    for one, other in zip(alone, together, strict=True):
        is_same = mx.abs(one - other).max() <= TOLERANCE * (one.max() - one.min())
        if not is_same.item():  # also when it is NaN
            logger.info("two prompts in one batch give other results than alone")
            return False
    return True


def _can_merge(cache: Any) -> bool:
    return hasattr(cache, "merge") and all(map(_can_merge, getattr(cache, "caches", ())))


def _first_logprobs_alone(model: nn.Module, prompt: tuple[int, ...]) -> mx.array:
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    stream = mx.default_stream(mx.default_device())
    with closing(generate_step(mx.array(prompt), model, stream, max_tokens=1)) as steps:
        _, logprobs = next(steps)
    first: mx.array = logprobs.astype(mx.float32)
    return first


def _first_logprobs_together(model: nn.Module) -> list[mx.array]:
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator

    stream = mx.default_stream(mx.default_device())
    with closing(BatchGenerator(model, max_tokens=1, stream=stream)) as generator:
        ids = generator.insert([list(prompt) for prompt in TRIAL_PROMPTS])
        found: dict[int, mx.array] = {}
        while len(found) < len(ids):
            _, responses = generator.next()
            found |= {response.uid: response.logprobs for response in responses}
    return [found[uid].astype(mx.float32) for uid in ids]
