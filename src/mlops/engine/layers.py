"""Layers with an adapter: each wraps a layer of the base model and adds the adapter's part.

    LoRA (Hu et al., 2021):  y = W x + scale · B A x
    DoRA (Liu et al., 2024): y = m / |W + scale · B A| · (W x + scale · B A x), norms by output

The scale is folded into B and DoRA's norms are computed once, in float32. A layer leaves its base
layer as it is, so many adapters can wrap the same one.
"""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types.

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
from mlx import nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlops.errors import PackagingError


@dataclass(frozen=True)
class AdapterTensors:
    """One adapter's tensors for one layer, float32, oriented as the formulas of mlx-lm have them.

    Attributes:
        a: (in, rank) for a linear, (rows, rank) for an embedding, (experts, rank, in) for experts.
        b: (rank, out), or (experts, out, rank); the scale is in it.
        magnitude: DoRA's m, (out,) for a linear and (rows,) for an embedding.
    """

    a: mx.array
    b: mx.array
    magnitude: mx.array | None = None


class AdaptedLinear(nn.Module):
    """A linear layer with a LoRA or DoRA adapter."""

    def __init__(self, base: nn.Module, tensors: AdapterTensors) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = tensors.a, tensors.b
        self.gain = None
        if tensors.magnitude is not None:
            adapted = dequantized_weight(base) + (tensors.a @ tensors.b).T
            self.gain = tensors.magnitude / mx.linalg.norm(adapted, axis=1)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        delta = ((x @ self.a) @ self.b).astype(y.dtype)
        if self.gain is None:
            return y + delta
        gain = self.gain.astype(y.dtype)
        if "bias" in self.base:  # DoRA scales the weight, not the bias
            return gain * (y - self.base.bias + delta) + self.base.bias
        return gain * (y + delta)


class AdaptedEmbedding(nn.Module):
    """An embedding with a LoRA or DoRA adapter; `as_linear` serves tied output layers."""

    def __init__(self, base: nn.Module, tensors: AdapterTensors) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = tensors.a, tensors.b
        self.gain = None
        if tensors.magnitude is not None:
            adapted = dequantized_weight(base) + tensors.a @ tensors.b
            self.gain = tensors.magnitude / mx.linalg.norm(adapted, axis=1)

    def __call__(self, ids: mx.array) -> mx.array:
        y = self.base(ids)
        adapted = y + (self.a[ids] @ self.b).astype(y.dtype)
        return adapted if self.gain is None else self.gain[ids][..., None].astype(y.dtype) * adapted

    def as_linear(self, x: mx.array) -> mx.array:
        y = self.base.as_linear(x)
        adapted = y + ((x @ self.b.T) @ self.a.T).astype(y.dtype)
        return adapted if self.gain is None else self.gain.astype(y.dtype) * adapted


class AdaptedSwitchLinear(nn.Module):
    """The linears of a mixture of experts, each expert with its own LoRA adapter."""

    def __init__(self, base: nn.Module, tensors: AdapterTensors) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = tensors.a, tensors.b

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = self.base(x, indices, sorted_indices=sorted_indices)
        delta = x.astype(self.a.dtype)
        for factor in (self.a, self.b):
            delta = mx.gather_mm(
                delta,
                factor.swapaxes(-1, -2),
                rhs_indices=indices,
                sorted_indices=sorted_indices,
            )
        return y + delta.astype(y.dtype)


def wrap_layer(name: str, base: nn.Module, tensors: AdapterTensors) -> nn.Module:
    """The layer `base`, called `name`, with an adapter's tensors.

    Raises:
        PackagingError: the layer is of a kind that takes no adapter, or the shapes differ.
    """
    expected: tuple[tuple[int, ...], tuple[int, ...]]
    rank = tensors.a.shape[1]
    num_in = num_out = 0
    layer_class: type[nn.Module]
    if isinstance(base, SwitchLinear | QuantizedSwitchLinear):
        layer_class = AdaptedSwitchLinear
        num_experts, num_in, num_out = base.num_experts, base.input_dims, base.output_dims
        expected = ((num_experts, rank, num_in), (num_experts, num_out, rank))
    elif isinstance(base, nn.Linear | nn.QuantizedLinear | nn.Embedding | nn.QuantizedEmbedding):
        is_linear = isinstance(base, nn.Linear | nn.QuantizedLinear)
        layer_class = AdaptedLinear if is_linear else AdaptedEmbedding
        num_rows, num_columns = base.weight.shape[0], weight_columns(base)
        num_in, num_out = (num_columns, num_rows) if is_linear else (num_rows, num_columns)
        expected = ((num_in, rank), (rank, num_out))
    else:
        raise PackagingError(
            f"the adapter has tensors for {name}, a {type(base).__name__}, which takes no adapter",
            "load_adapter",
            {"module": name},
        )
    found = (tensors.a.shape, tensors.b.shape)
    if found != expected:
        raise PackagingError(
            f"the adapter's tensors for {name} have the shapes {found[0]} and {found[1]}; the base "
            f"model needs {expected[0]} and {expected[1]}: it was trained on another base",
            "load_adapter",
            {"module": name},
        )
    if tensors.magnitude is not None and layer_class is AdaptedSwitchLinear:
        raise PackagingError(
            f"the adapter has DoRA magnitudes for {name}, whose experts take LoRA only",
            "load_adapter",
            {"module": name},
        )
    return layer_class(base, tensors)


def weight_columns(layer: nn.Module) -> int:
    """Columns of a weight matrix, (rows, columns), counted before it was packed."""
    if "scales" in layer:
        return int(layer.scales.shape[-1] * layer.group_size)
    return int(layer.weight.shape[-1])


def dequantized_weight(layer: nn.Module) -> mx.array:
    """A layer's weight in float32, (rows, columns) or (experts, rows, columns)."""
    if "scales" not in layer:
        return layer.weight.astype(mx.float32)
    scales, biases = layer.scales, layer.get("biases")
    if layer.mode == "affine":  # in bfloat16 the product would be rounded once more
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(
        layer.weight,
        scales,
        biases,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        global_scale=layer.get("global_scale"),
        dtype=mx.float32,
    )
