"""Rotary position embeddings that mlx-lm's class for an architecture does not compute.

Some classes ignore `rope_scaling`, each computes other types, none all of their parts. What a
layer's attention calls `rope` is replaced by one that has the wavelengths of
`checkpoints.rope.frequencies`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx import nn

from mlops.checkpoints.rope import Rope, frequencies

_ALWAYS_TRADITIONAL = frozenset({"DeepseekV2YarnRotaryEmbedding"})
"""Classes of mlx-lm that rotate neighbours, and have no attribute that says so."""


class ScaledRoPE(nn.Module):  # type: ignore[misc]
    """Rotates the first `dims` numbers of each head by angles of given wavelengths.

    Args:
        wavelengths: over 2π, of each of the `dims / 2` pairs.
        scale: factor of sine and cosine.
        traditional: pairs are neighbours, not halves.
    """

    def __init__(
        self, dims: int, wavelengths: Sequence[float], scale: float, traditional: bool
    ) -> None:
        super().__init__()
        self.dims = dims
        self.traditional = traditional
        self.scale = scale
        self._wavelengths = mx.array(list(wavelengths), dtype=mx.float32)

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """Rotate `x`, (rows, heads, tokens, head); `offset` is the first token's position."""
        if self.scale != 1.0:
            x = x.at[..., : self.dims].multiply(self.scale)
        return mx.fast.rope(
            x,
            self.dims,
            traditional=self.traditional,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self._wavelengths,
        )


def set_ropes(model: Any, ropes: Sequence[Rope | None]) -> None:
    """Replace the rotary embeddings of a model's layers.

    Args:
        ropes: `Checkpoint.ropes`.

    Raises:
        ValueError: the model has no such layers.
    """
    if not ropes:
        return
    layers = model.layers
    if len(ropes) == 1:
        ropes = [ropes[0]] * len(layers)
    num_replaced = 0
    for layer, rope in zip(layers, ropes, strict=True):
        for module in layer.modules():
            dims = _dims(module.get("rope"))
            if rope is not None and dims is not None:
                _replace(module, rope, rope.dims or dims)
                num_replaced += 1
    if not num_replaced:
        raise ValueError("none of its layers has a rotary embedding")


def _dims(rope: Any) -> int | None:
    """How many numbers of each head are rotated; None for no rotary embedding (`NoPE`)."""
    for name in ("dims", "dim"):
        if hasattr(rope, name):
            return int(getattr(rope, name))
    return 2 * rope._freqs.size if hasattr(rope, "_freqs") else None


def _replace(attention: nn.Module, rope: Rope, dims: int) -> None:
    old = attention.rope
    traditional = bool(getattr(old, "traditional", type(old).__name__ in _ALWAYS_TRADITIONAL))
    wavelengths, scale = frequencies(rope, dims)
    attention.rope = ScaledRoPE(dims, wavelengths, scale, traditional)
