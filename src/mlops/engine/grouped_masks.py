"""Masks for attention of mlx-lm's that keeps each group of heads apart.

mlx-lm's Gemma 2 computes scores of shape (rows, key heads, queries of each, tokens, tokens). A mask
that differs between rows has (rows, 1, tokens, tokens), which would be read as one for each key
head: it needs one more axis. Without it such a model could only be computed row by row.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

GROUPED = frozenset({"gemma2"})
"""Architectures whose attention is of this kind."""


def fit_masks(model: Any, architecture: str | None) -> None:
    """Let the attention of all layers take masks that differ between rows."""
    if architecture not in GROUPED:
        return
    kind = type(model.layers[0].self_attn)

    class GroupedAttention(kind):  # type: ignore[misc, valid-type]
        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
            if isinstance(mask, mx.array) and mask.ndim == 4 and self.repeats > 1:
                mask = mask[:, :, None]
            computed: mx.array = super().__call__(x, mask, cache)
            return computed

    for layer in model.layers:
        layer.self_attn.__class__ = GroupedAttention
