"""How a model uses its layers: seen once before they are wrapped, not assumed.

An adapter works where the model calls the layer with the batch's rows in front. Some of mlx-lm's
models read a layer's weight instead (a tied output layer as `embed_tokens.weight.T`), or hand its
experts one token after the other: there an adapter would do nothing, or reach other rows.
"""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types.

from __future__ import annotations

import logging

import mlx.core as mx
from mlx import nn

from mlops.engine.mlx_lm import make_prompt_cache

logger = logging.getLogger(__name__)

NUM_TOKENS = 3


class Witness(nn.Module):
    """Stands in for a layer during one forward pass, and notes how it is used.

    Args:
        base: the layer.
        must_be_output: an embedding that should be the output layer as well.
    """

    def __init__(self, base: nn.Module, must_be_output: bool = False) -> None:
        super().__init__()
        self.base = base
        self.must_be_output = must_be_output
        self.shapes = set[tuple[int, ...]]()
        self.is_called = self.is_output = self.is_weight_read = False

    def __getattr__(self, key: str) -> object:
        if key in self:
            return self[key]
        if "base" not in self:
            raise AttributeError(key)
        if key == "weight":
            self.is_weight_read = True
        return getattr(self["base"], key)

    def __call__(self, x: mx.array, *others: mx.array) -> mx.array:
        self.is_called = True
        # A block of experts goes by the indices.
        self.shapes.add((others[0] if others else x).shape)
        return self.base(x, *others)

    def as_linear(self, x: mx.array) -> mx.array:
        self.is_output = True
        self.shapes.add(x.shape)
        return self.base.as_linear(x)

    def problem(self, num_rows: int, num_tokens: int) -> str | None:
        """Why an adapter cannot work here, or None. A layer that is not used is none: it happens
        (layers that share others' keys and values), and an adapter has nothing to change there."""
        is_embedding = hasattr(self.base, "as_linear")
        is_used = self.is_output if is_embedding else self.is_called
        if self.is_weight_read and not is_used:
            return "reads its weight past the adapter"
        if self.must_be_output and not self.is_output:
            return "has no output layer that is tied to it"
        for shape in self.shapes:
            is_flat = len(shape) == 2 and shape[0] == num_rows * num_tokens
            if len(shape) < 2 or not (shape[0] == num_rows or is_flat):
                return "computes it without regard to the rows of a batch"
        return None


def lay_out_forward_pass(model: nn.Module) -> tuple[int, int]:
    """Call the model and compute nothing; returns the number of rows and of tokens in each."""
    try:
        _call(model, 2)
    except Exception as exc:  # as `batching` found as well: such a model runs row by row
        logger.info("a forward pass of two rows fails: %s", exc)
        _call(model, 1)
        return 1, NUM_TOKENS
    return 2, NUM_TOKENS


def _call(model: nn.Module, num_rows: int) -> None:
    tokens = mx.array([[1, 2, 3][:NUM_TOKENS]] * num_rows)
    model(tokens, cache=make_prompt_cache(model))
