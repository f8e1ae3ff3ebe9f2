"""Parts of a model computed in another way on a CPU, where MLX's own way is slow.

MLX's CPU kernel for the exponential computes one element after the other and takes 25 ns for each;
a gated feed-forward layer spends more time there than in a matrix product. Here its exponential is
a polynomial of plain multiplications and additions, which compilers turn into vector instructions:
8 times faster where MLX can compile it (g++ is there), 3 times otherwise. In attention, whose
shapes change at every step and so cannot be compiled, it is a power, which takes 9 ns. Every
operation costs 10 microseconds besides, and a rotary embedding is some ten of them: at a decode
step it is one product with the matrix of the rotation instead, which all layers share.

A layer is replaced only when it gives the same as before on a trial, so an architecture whose layer
looks alike and computes something else keeps its own.
"""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types.

from __future__ import annotations

import logging
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten

from mlops.engine.mlx_lm import KVCache, SwiGLU, SwitchGLU

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5
LOG2_E = 1.4426950408889634
ROUNDER = 12582912.0
"""1.5 * 2**23: adding and subtracting it rounds a float32 to the nearest integer."""

LOWEST = -1e30
"""A score far below every other, and not infinite: a row that may look nowhere must not be NaN."""

ATTENTION_LAYERS = {
    ("mlx_lm.models.llama", "Attention"),  # Mistral's too
    ("mlx_lm.models.qwen2", "Attention"),
    ("mlx_lm.models.qwen3", "Attention"),
    ("mlx_lm.models.qwen3_moe", "Attention"),
}
"""Those read and known to be this computation at every position, which a trial cannot show."""

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
    rotations: list[Rotation] = []
    tried: dict[tuple[Any, ...], bool] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SwitchGLU) and isinstance(layer.activation, SwiGLU):
            layer.activation = FastSwiGLU()
            replaced += 1
            continue
        fast: nn.Module
        if _looks_gated(layer):
            fast = FastGatedMLP(layer)
            kind, is_same = _kind(layer), _is_same
        elif (type(layer).__module__, type(layer).__name__) in ATTENTION_LAYERS:
            rotation = _share_rotation(layer, rotations)
            fast = FastAttention(layer, rotation)
            kind, is_same = (*_kind(layer), rotations.index(rotation)), _attends_alike
        else:
            continue
        if kind not in tried:
            tried[kind] = is_same(layer, fast)
        if tried[kind]:
            model.update_modules(tree_unflatten([(name, fast)]))
            replaced += 1
    return replaced


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """Everything that a layer computes with but the values of its weights: layers that have it in
    common compute the same of the same weights, so one of them is tried for all."""
    return tuple(
        (
            path,
            type(module),
            tuple(sorted((name, repr(value)) for name, value in vars(module).items())),
            tuple((name, array.shape) for name, array in module.items() if hasattr(array, "shape")),
        )
        for path, module in layer.named_modules()
    )


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


class Rotation:
    """A rotary embedding (Su et al., 2021) as a matrix, worked out once for all layers of a step.

    It is linear, so its matrix at a position is what it makes of the unit vectors there.
    """

    def __init__(self, rope: nn.Module, head_size: int) -> None:
        self.rope = rope
        self.head_size = head_size
        self._unit = mx.eye(head_size)[None, :, None]  # (1, heads, tokens, head size)
        self._last: tuple[mx.array | int, mx.array] | None = None

    def matrix(self, offset: mx.array | int) -> mx.array:
        """(head size, head size) for one position, (rows, head size, head size) for (rows,)."""
        if self._last is None or not _is_same_offset(self._last[0], offset):
            self._last = offset, self._make_matrix(offset)
        return self._last[1]

    def is_same(self, other: Rotation) -> bool:
        """True when both turn alike."""
        return (type(self.rope), self.head_size) == (type(other.rope), other.head_size) and all(
            mx.array_equal(self._make_matrix(at), other._make_matrix(at)).item() for at in (1, 1000)
        )

    def _make_matrix(self, offset: mx.array | int) -> mx.array:
        if isinstance(offset, int):
            return self.rope(self._unit, offset=offset)[0, :, 0]
        unit = mx.broadcast_to(self._unit, (offset.size, *self._unit.shape[1:]))
        return self.rope(unit, offset=offset)[:, :, 0]


class FastAttention(nn.Module):
    """Attention with grouped heads, with the parts of the layer that it replaces."""

    def __init__(self, layer: nn.Module, rotation: Rotation) -> None:
        super().__init__()
        for name, child in layer.children().items():
            self[name] = child
        self.n_heads, self.n_kv_heads = layer.n_heads, layer.n_kv_heads
        self.scale = layer.scale
        self.rotation = rotation

    def __call__(
        self, x: mx.array, mask: mx.array | str | None = None, cache: Any = None
    ) -> mx.array:
        rows, num_tokens, _ = x.shape
        queries = self._split(self.q_proj(x), self.n_heads, "q_norm")
        keys = self._split(self.k_proj(x), self.n_kv_heads, "k_norm")
        values = self._split(self.v_proj(x), self.n_kv_heads)
        if cache is None:
            queries, keys = self.rope(queries), self.rope(keys)
        elif num_tokens == 1:
            rotation = self.rotation.matrix(cache.offset)
            queries = queries[:, :, 0] @ rotation
            keys = (keys[:, :, 0] @ rotation)[:, :, None]
        else:
            queries = self.rope(queries, offset=cache.offset)
            keys = self.rope(keys, offset=cache.offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        # Scores are powers of two instead of e, which the scale takes care of.
        queries = (queries * (self.scale * LOG2_E)).reshape(
            rows, self.n_kv_heads, -1, keys.shape[3]
        )
        scores = _masked(queries @ keys.swapaxes(-1, -2), mask, num_tokens)
        weights = mx.power(2.0, scores - scores.max(axis=-1, keepdims=True))
        output = (weights @ values) / weights.sum(axis=-1, keepdims=True)
        output = output.reshape(rows, self.n_heads, num_tokens, -1)
        return self.o_proj(output.transpose(0, 2, 1, 3).reshape(rows, num_tokens, -1))

    def _split(self, x: mx.array, num_heads: int, norm: str | None = None) -> mx.array:
        """(rows, tokens, heads * head size) to (rows, heads, tokens, head size)."""
        x = x.reshape(*x.shape[:2], num_heads, -1)
        if norm in self:
            x = self[norm](x)
        return x.transpose(0, 2, 1, 3)


def _masked(scores: mx.array, mask: mx.array | str | None, num_tokens: int) -> mx.array:
    """Scores, (rows, key heads, group * tokens, columns), with the lowest where nobody looks.

    Args:
        mask: true where it may look, (tokens, columns) or (rows, 1, tokens, columns); or "causal".
    """
    if mask is None:
        return scores
    rows, heads, _, columns = scores.shape
    if isinstance(mask, str):
        mask = mx.arange(columns - num_tokens, columns)[:, None] >= mx.arange(columns)
    if num_tokens == 1:
        mask = mask.reshape(-1, 1, 1, columns)
        return mx.where(mask, scores, LOWEST)
    grouped = scores.reshape(rows, heads, -1, num_tokens, columns)
    mask = mask.reshape(-1, 1, 1, num_tokens, columns)
    return mx.where(mask, grouped, LOWEST).reshape(scores.shape)


def _share_rotation(layer: nn.Module, known: list[Rotation]) -> Rotation:
    """The rotation of an earlier layer where this one has the same."""
    own = Rotation(layer.rope, layer.k_proj.weight.shape[0] // layer.n_kv_heads)
    for rotation in known:
        if rotation.is_same(own):
            return rotation
    known.append(own)
    return own


def _is_same_offset(one: mx.array | int, other: mx.array | int) -> bool:
    # The caches of all layers give the same array object within a step.
    return one is other or (isinstance(one, int) and isinstance(other, int) and one == other)


def _attends_alike(layer: nn.Module, fast: FastAttention) -> bool:
    """Try a prompt and a decode step: of one row, then of two with padding."""
    hidden = layer.q_proj.weight.shape[-1]
    columns = mx.arange(5)
    padded = (columns[:, None] >= columns) & (columns >= mx.array([0, 2])[:, None, None, None])
    try:
        for rows, mask, mask_of_step in (
            (1, "causal", None),
            (2, padded, mx.array([[True] * 6, [False] * 2 + [True] * 4])[:, None, None]),
        ):
            x = mx.random.normal((rows, 6, hidden), key=mx.random.key(rows))
            answers = []
            for attend in (layer, fast):
                cache = KVCache()
                prompt = attend(x[:, :5], mask, cache)
                answers.append(mx.concatenate([prompt, attend(x[:, 5:], mask_of_step, cache)], 1))
            # What is padding is different rubbish.
            expected, found = (answer[:, 2:] for answer in answers)
            difference = mx.abs(expected - found).max() / mx.abs(expected).max()
            if not (difference <= TOLERANCE).item():
                return False
    except Exception as exc:
        logger.debug("%s keeps its own attention: %s", type(layer).__name__, exc)
        return False
    return True


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
