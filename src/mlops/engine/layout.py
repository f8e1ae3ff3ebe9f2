"""Weights in the layout that the device is fast at.

Metal and CUDA compute with 4-bit and bfloat16 weights as fast as memory delivers them: they keep
the checkpoint's. On a CPU MLX's kernels for those are 7 to 16 times slower than float32 through
BLAS, so a CPU holds float32, when that fits the memory.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from mlops.checkpoints import Checkpoint, describe_quantization
from mlops.engine.finite import check_weights

if TYPE_CHECKING:
    from mlx import nn

logger = logging.getLogger(__name__)

MEMORY_SHARE = 0.6
"""Of the machine's memory, what weights may take: the rest is for caches and everybody else."""


def lay_out(
    model: nn.Module, checkpoint: Checkpoint, device: str, memory_budget_bytes: int | None = None
) -> str:
    """Bring a lazily loaded model's weights into memory; says in words in which layout.

    Args:
        device: `"gpu"` or `"cpu"`.
        memory_budget_bytes: the most that weights may take; by default a share of the machine's
            memory, less what MLX already holds.

    Raises:
        ServiceError: a weight is not finite.
    """
    layout = _lay_out(model, checkpoint, device, memory_budget_bytes)
    check_weights(model, checkpoint.path)
    return layout


def _lay_out(
    model: nn.Module, checkpoint: Checkpoint, device: str, memory_budget_bytes: int | None
) -> str:
    import mlx.core as mx

    stored = _describe_stored(checkpoint)
    if device == "cpu" and stored != "float32":
        needed = 4 * (checkpoint.num_parameters or 0)
        budget = _default_budget() if memory_budget_bytes is None else memory_budget_bytes
        if 0 < needed <= budget:
            _convert_to_float32(model)
            is_quantized = checkpoint.quantization is not None
            return f"float32 ({'dequantized' if is_quantized else 'cast'} from {stored})"
        logger.warning(
            "%s stays %s, about ten times slower on this CPU: float32 needs %s MiB, "
            "and %d MiB may be used",
            checkpoint.path,
            stored,
            needed // 2**20 or "an unknown number of",
            budget // 2**20,
        )
    mx.eval(model.parameters())
    return f"{stored} (as stored)"


def _describe_stored(checkpoint: Checkpoint) -> str:
    if checkpoint.quantization is not None:
        return describe_quantization(checkpoint.quantization)
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return "/".join(sorted(names.get(dtype, dtype) for dtype in checkpoint.dtypes))


def _default_budget() -> int:
    import mlx.core as mx

    from mlops.hardware import detect

    return max(0, int(detect().memory_bytes * MEMORY_SHARE) - mx.get_active_memory())


def _convert_to_float32(model: nn.Module) -> None:
    """Replace quantized layers by plain ones and cast the rest, one layer after the other."""
    import mlx.core as mx
    from mlx.utils import tree_unflatten

    from mlops.engine.owner import check_stopping

    for name, layer in model.named_modules():
        check_stopping()
        plain = _dequantize(layer)
        if plain is not None:
            mx.eval(plain.parameters())
            model.update_modules(tree_unflatten([(name, plain)]))
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())


def _dequantize(layer: nn.Module) -> nn.Module | None:
    """The plain float32 layer that computes the same; None for every other kind of layer."""
    from mlx import nn

    from mlops.engine.layers import dequantized_weight
    from mlops.engine.mlx_lm import QuantizedSwitchLinear, SwitchLinear

    plain: nn.Module
    if isinstance(layer, nn.QuantizedLinear):
        plain = nn.Linear(1, 1, bias=False)
    elif isinstance(layer, nn.QuantizedEmbedding):
        plain = nn.Embedding(1, 1)
    elif isinstance(layer, QuantizedSwitchLinear):
        plain = SwitchLinear(1, 1, 1, bias=False)
    else:
        return None
    plain.weight = dequantized_weight(layer)
    if "bias" in layer:
        plain.bias = layer.bias
    return plain
