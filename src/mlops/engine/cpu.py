"""Parts of a model computed in another way on a CPU, where MLX's own way is slow.

MLX's CPU kernel for the exponential computes one element after the other and takes 25 ns for each;
a gated feed-forward layer spends more time there than in a matrix product. Here the exponential is
a polynomial of plain multiplications and additions, which compilers turn into vector instructions:
8 times faster where MLX can compile it (g++ is there), 3 times otherwise.

A layer is replaced only when it gives the same as before on a trial, so an architecture whose layer
looks alike and computes something else keeps its own.
"""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types.

from __future__ import annotations

import logging

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import SwiGLU, SwitchGLU

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5
LOG2_E = 1.4426950408889634
ROUNDER = 12582912.0
"""1.5 * 2**23: adding and subtracting it rounds a float32 to the nearest integer."""

COEFFICIENTS = (
    1.535336188319500e-4,
    1.339887440266574e-3,
    9.618437357674640e-3,
    5.550332471162809e-2,
    2.402264791363012e-1,
    6.931472028550421e-1,
    1.0,
)
"""2**f for f in [-0.5, 0.5], highest power first; a relative error of 2e-7. The minimax polynomial
that Cephes' exp2f uses (Moshier, 1987)."""


def use_cpu_layers(model: nn.Module) -> int:
    """Replace what is slow on a CPU; says how many layers. Weights must be float32."""
    replaced = 0
    for name, layer in model.named_modules():
        if isinstance(layer, SwitchGLU) and isinstance(layer.activation, SwiGLU):
            layer.activation = FastSwiGLU()
            replaced += 1
        elif _looks_gated(layer):
            fast = FastGatedMLP(layer)
            if _is_same(layer, fast):
                model.update_modules(tree_unflatten([(name, fast)]))
                replaced += 1
    return replaced


def exp(x: mx.array) -> mx.array:
    """e**x of float32, as 2**n * 2**f; x is cut to [-87, 87], where both ends are finite."""
    y = mx.clip(x, -87.0, 87.0) * LOG2_E
    whole = (y + ROUNDER) - ROUNDER
    rest = y - whole
    power = COEFFICIENTS[0] * rest + COEFFICIENTS[1]
    for coefficient in COEFFICIENTS[2:]:
        power = power * rest + coefficient
    exponent = mx.left_shift(whole.astype(mx.int32) + 127, 23)
    return power * exponent.view(mx.float32)


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x (Shazeer, 2020), float32."""
    # Flat, since a compiled function is kept for every shape it ever saw.
    return _swiglu(gate.reshape(-1), x.reshape(-1)).reshape(x.shape)


@mx.compile
def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    return gate * x / (1.0 + exp(-gate))


class FastSwiGLU(nn.Module):
    """The activation of a mixture of experts, in mlx-lm's order of arguments."""

    def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
        return swiglu(gate, x)


class FastGatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with the linears of the layer that it replaces."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = layer.gate_proj, layer.up_proj
        self.down_proj = layer.down_proj

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def _looks_gated(layer: nn.Module) -> bool:
    """True for a layer that has these three linears and nothing else."""
    return set(layer.children()) == {"gate_proj", "up_proj", "down_proj"} and all(
        type(linear) is nn.Linear for linear in layer.children().values()
    )


def _is_same(layer: nn.Module, fast: FastGatedMLP) -> bool:
    num_in = layer.gate_proj.weight.shape[-1]
    # Large, and of both signs, so that another activation, or a limit to one, shows.
    x = mx.random.normal((1, 4, num_in), key=mx.random.key(0)) * 10.0
    try:
        expected, found = layer(x), fast(x)
        difference = mx.abs(expected - found).max() / mx.abs(expected).max()
        return bool((difference <= TOLERANCE).item())
    except Exception as exc:  # whatever the layer needs besides x, it is not this one
        logger.debug("%s keeps its own computation: %s", type(layer).__name__, exc)
        return False
