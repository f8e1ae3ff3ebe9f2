"""Numbers that can be computed with: no NaN, nothing infinite, nothing whose square overflows.

One damaged number makes NaN of every answer that comes upon it, and a server that says NaN's token
for ever looks healthy. So weights are checked while they are laid out, all of them, since a trial
routes to few experts and reads few rows of an embedding; and settings by the logits of a trial.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlops.counts import count
from mlops.errors import ServiceError

if TYPE_CHECKING:
    import mlx.core as mx
    from mlx import nn

LARGEST = 1e18
"""Of a weight, or of a column of them summed up: the square of a larger one overflows float32."""

TRIAL_TOKENS = (1, 2, 3, 1, 5, 4)

_SETTING_PARTS = ("theta", "eps", "epsilon", "scale", "scaling", "factor", "multiplier", "alpha")


def check_weights(model: nn.Module, path: Path) -> None:
    """Refuse a model in memory that has a weight which cannot be computed with.

    A sum for each column, as a product of matrices: it reads each weight once, as fast as memory
    gives it, and one number that is not finite makes its column's sum not finite. 1 GiB of float32
    takes 0.05 s on two cores.

    Raises:
        ServiceError: it names the tensor.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    arrays = dict(tree_flatten(model.parameters()))
    sums = {name: _column_sums(array) for name, array in arrays.items()}
    fine = {name: mx.all(mx.abs(of_columns) < LARGEST) for name, of_columns in sums.items()}
    mx.eval(fine)
    for name, is_fine in fine.items():
        if not is_fine.item():
            raise ServiceError(
                f"{path} has {_describe(arrays[name])} in {name}: nothing can be computed with "
                "it; copy or convert the weights again",
                "load_model",
                {"path": str(path), "tensor": name},
            )


def _column_sums(array: mx.array) -> mx.array:
    """Of an array's last axis; integers, which quantized weights are, count as zero."""
    import mlx.core as mx

    if array.size == 0 or not mx.issubdtype(array.dtype, mx.floating):
        # Scales that are exponents (mxfp4, mxfp8) have one number for NaN.
        is_exponent = array.dtype == mx.uint8
        return mx.where(mx.any(array == 255), math.nan, 0.0) if is_exponent else mx.array(0.0)
    if array.ndim < 2:
        return array
    matrix = array.reshape(-1, array.shape[-1])
    # The sum of many halves overflows, their mean does not.
    weight = 1 / matrix.shape[0] if array.dtype == mx.float16 else 1.0
    return mx.full((1, matrix.shape[0]), weight, array.dtype) @ matrix


def _describe(array: mx.array) -> str:
    import mlx.core as mx

    if not mx.issubdtype(array.dtype, mx.floating):
        return "a scale that is NaN"
    num_bad: Any = (~mx.isfinite(array)).sum().item()
    if num_bad:
        return f"{count(num_bad, 'value')} that {'is' if num_bad == 1 else 'are'} NaN or infinite"
    return f"values as large as {mx.abs(array).max().item():.2g}"


def is_computable(logits: mx.array) -> mx.array:
    """True, as an array, for logits that a token can be drawn from: no NaN, a largest one.

    A model may give the tokens that it never says minus infinity.
    """
    import mlx.core as mx

    is_bad = mx.isnan(logits) | (logits == mx.inf)
    return ~mx.any(is_bad) & mx.all(mx.any(logits > -mx.inf, axis=-1))


def gives_finite_logits(model: nn.Module) -> bool:
    """Compute a few tokens with the model as it is now, with whatever adapter is in use."""
    import mlx.core as mx

    from mlops.engine.prefill import new_caches

    logits = model(mx.array([TRIAL_TOKENS]), cache=new_caches(model))
    return bool(is_computable(logits).item())


def suspicious_settings(config: Mapping[str, Any]) -> list[str]:
    """Settings of a config that may be why logits are not finite: `rope_theta is 0`."""
    return [
        f"{name} is {value:g}"
        for name, value in _numbers(config)
        if not math.isfinite(value)
        or (any(part in name for part in _SETTING_PARTS) and not 0 < value < LARGEST)
    ]


def _numbers(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, float) or type(value) is int:
            is_too_long = type(value) is int and value.bit_length() > 1000
            yield f"{prefix}{name}", math.inf if is_too_long else float(value)
