"""What the values of an adapter's tensors show: that it changes nothing, or went astray."""

from __future__ import annotations

from mlops.checkpoints.checkpoint import Checkpoint
from mlops.checkpoints.refusal import refusal
from mlops.checkpoints.tensor_values import is_finite, is_zero


def adapter_delta_is_zero(adapter: Checkpoint) -> bool:
    """True when the adapter changes nothing: for every module A or B is all zeros, or the scale is.

    So are adapters before training. Only bytes are looked at, up to the first that is not zero.
    DoRA's magnitudes are not: they only ever move together with B.
    """
    if adapter.adapter is None:
        raise refusal(f"{adapter.path} is not an adapter", adapter.path, "adapter_delta_is_zero")
    return all(
        module.scale == 0
        or is_zero(module.file, adapter.tensors[module.key_b])
        or is_zero(module.file, adapter.tensors[module.key_a])
        for module in adapter.adapter.modules.values()
    )


def check_finite(adapter: Checkpoint) -> None:
    """Raise `PackagingError` when a tensor of an adapter holds infinity or NaN."""
    for module in adapter.adapter.modules.values() if adapter.adapter is not None else ():
        for key in (module.key_a, module.key_b, module.key_m):
            if key is not None and not is_finite(module.file, adapter.tensors[key]):
                raise refusal(
                    f"{key} of the adapter {adapter.path} holds infinity or NaN: the training went "
                    "astray; take an earlier checkpoint of it",
                    adapter.path,
                    "check_finite",
                    tensors=[key],
                )
