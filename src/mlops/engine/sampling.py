"""Drawing the next token of one row from its log-probabilities.

Every row has a random key of its own, so a seed gives the same tokens whatever else is in the
batch. The filters are not compiled: their limits come from clients, and a compiled function is
kept for every value it ever saw.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING

from mlops.engine.request import Sampling

if TYPE_CHECKING:
    import mlx.core as mx

LOWEST_TEMPERATURE = 1e-4
"""Below it, dividing by the temperature leaves nothing but the most likely token."""

Sampler = Callable[["mx.array"], "mx.array"]


def make_sampler(sampling: Sampling) -> Sampler:
    """A function from log-probabilities, float (1, vocabulary), to one token id, uint32 (1,).

    A sampler with a temperature counts its draws: use one per generation.
    """
    import mlx.core as mx
    from mlx_lm.sample_utils import greedy_sampler

    if sampling.temperature < LOWEST_TEMPERATURE:
        return greedy_sampler  # type: ignore[no-any-return]  # shared: rows of one batch use one call
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    key = mx.random.key(seed)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        logprobs = logprobs.astype(mx.float32)
        if sampling.top_p < 1:
            logprobs = keep_top_p(logprobs, sampling.top_p)
        if sampling.min_p > 0:
            logprobs = keep_min_p(logprobs, sampling.min_p)
        if 0 < sampling.top_k < logprobs.shape[-1]:
            logprobs = keep_top_k(logprobs, sampling.top_k)
        key, drawn = mx.random.split(key)
        return mx.random.categorical(logprobs / sampling.temperature, key=drawn)

    return sample


def keep_top_p(logprobs: mx.array, top_p: float) -> mx.array:
    """Nucleus sampling (Holtzman et al., 2020): the fewest tokens that reach the mass `top_p`."""
    import mlx.core as mx

    ordered = mx.sort(logprobs, axis=-1)[..., ::-1]
    mass = mx.softmax(ordered, axis=-1)
    mass_above = mx.cumsum(mass, axis=-1) - mass
    num_kept = mx.maximum((mass_above < top_p).sum(axis=-1, keepdims=True), 1)
    threshold = mx.take_along_axis(ordered, num_kept - 1, axis=-1)
    return mx.where(logprobs < threshold, -math.inf, logprobs)


def keep_min_p(logprobs: mx.array, min_p: float) -> mx.array:
    """Tokens at least `min_p` times as likely as the most likely one."""
    import mlx.core as mx

    threshold = logprobs.max(axis=-1, keepdims=True) + math.log(min_p)
    return mx.where(logprobs < threshold, -math.inf, logprobs)


def keep_top_k(logprobs: mx.array, top_k: int) -> mx.array:
    """The `top_k` most likely tokens, and those as likely as the last of them."""
    import mlx.core as mx

    threshold = mx.topk(logprobs, top_k, axis=-1).min(axis=-1, keepdims=True)
    return mx.where(logprobs < threshold, -math.inf, logprobs)
