"""Prompts into caches: several prompts, of different lengths and adapters, in one forward pass.

All tokens of a prompt but the last are computed here, chunk by chunk. The last one is the first
input of the decode batch, so no log-probabilities are ever computed for a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlops.engine.kv import Caches, begin_computing
from mlops.engine.mlx_lm import KVCache, make_prompt_cache

if TYPE_CHECKING:
    from mlx import nn


def new_caches(model: nn.Module) -> Caches:
    """Empty caches for one sequence, one per layer."""
    caches: Caches = make_prompt_cache(model)
    return caches


def prefill(
    model: nn.Module, caches: Sequence[Caches], tokens: Sequence[Sequence[int]]
) -> list[Caches]:
    """Compute the next tokens of several sequences in one forward pass, without waiting for it.

    Args:
        caches: of each sequence, all empty or none; left in an undefined state.
        tokens: the next ids of each sequence, at least one; lengths may differ.

    Returns:
        The caches of each sequence, with its tokens.
    """
    if len(tokens) == 1:
        model(mx.array([tokens[0]]), cache=caches[0])
        after = [caches[0]]
    elif all(_is_fresh(sequence) for sequence in caches):
        after = _prefill_fresh(model, caches, tokens)
    else:
        after = _prefill_merged(model, caches, tokens)
    begin_computing(after)
    return after


def _prefill_fresh(
    model: nn.Module, caches: Sequence[Caches], tokens: Sequence[Sequence[int]]
) -> list[Caches]:
    """Prompts from their beginning: padded on the right, where nothing looks at the padding."""
    together = [KVCache() for _ in caches[0]]
    model(_pad(tokens), cache=together)
    after = []
    for row, sequence in enumerate(tokens):
        singles = []
        for cache in together:
            single = KVCache()
            # Copies: rows that stay views would keep the whole group in memory.
            single.keys = mx.contiguous(cache.keys[row : row + 1, :, : len(sequence)])
            single.values = mx.contiguous(cache.values[row : row + 1, :, : len(sequence)])
            single.offset = len(sequence)
            singles.append(single)
        after.append(singles)
    return after


def _prefill_merged(
    model: nn.Module, caches: Sequence[Caches], tokens: Sequence[Sequence[int]]
) -> list[Caches]:
    """Any caches that mlx-lm can batch, each with what it holds already."""
    merged: list[Any] = [type(layer[0]).merge(layer) for layer in zip(*caches, strict=True)]
    lengths = [len(sequence) for sequence in tokens]
    padding = [max(lengths) - length for length in lengths]
    if any(padding):
        for cache in merged:
            cache.prepare(lengths=lengths, right_padding=padding)
    model(_pad(tokens), cache=merged)
    if any(padding):
        for cache in merged:
            cache.finalize()
    return [[cache.extract(row) for cache in merged] for row in range(len(tokens))]


def _is_fresh(caches: Caches) -> bool:
    return all(type(cache) is KVCache and cache.keys is None for cache in caches)


def _pad(tokens: Sequence[Sequence[int]]) -> mx.array:
    longest = max(map(len, tokens))
    return mx.array([[*sequence, *([0] * (longest - len(sequence)))] for sequence in tokens])
