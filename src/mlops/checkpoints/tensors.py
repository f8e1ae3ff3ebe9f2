"""The tensors of all weight files of a checkpoint, and what their shapes mean when quantized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from mlops.checkpoints.checkpoint import TensorInfo
from mlops.checkpoints.files import CheckpointFile
from mlops.checkpoints.refusal import refusal
from mlops.checkpoints.safetensors import read_header

MLX_BITS = (1, 2, 3, 4, 5, 6, 8)
MLX_GROUP_SIZES = (16, 32, 64, 128)
_QUANTIZATION_PARTS = (
    ".scales", ".biases", ".qzeros", ".g_idx", "_scales",
    "_scale_inv", "weight_scale", "weight_scale_2", "weight_global_scale", "input_global_scale",
    "weight_zero_point", "weight_shape", "input_scale", "activation_scale",
)  # fmt: skip
_READ_HIDDEN = ("embed_tokens", "q_proj", "k_proj", "v_proj", "gate_proj", "lm_head")
"""Modules that are as wide as the model, where they have these names."""

_BITS_BY_DTYPE = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8}


def read_tensors(
    folder: Path, files: Iterable[CheckpointFile]
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of all files by name, and the files' metadata merged.

    Raises:
        PackagingError: a file is damaged, or two files hold a tensor of the same name.
    """
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for file in files:
        header = read_header(file.path, file.relative_path)
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise refusal(
                    f"the tensor {name} is in {tensors[name].file} and in {file.relative_path}; "
                    "remove the file that does not belong to the model",
                    folder,
                    tensor=name,
                    files=[tensors[name].file, file.relative_path],
                )
            tensors[name] = tensor
        metadata |= header.metadata
    return tensors, metadata


class WeightShapes:
    """Shapes of weights as the model sees them, whether they are stored quantized or not.

    MLX packs a quantized weight `(out, in)` into `(out, in * bits / 32)` 32-bit words, with
    `scales` of shape `(out, in / group_size)`.

    Args:
        tensors: of the whole checkpoint.
        config: content of `config.json`; how weights are quantized stands in its `quantization`
            (by module name where they differ) or its `quantization_config`.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> None:
        self.tensors = tensors
        settings = (config.get(key) for key in ("quantization", "quantization_config"))
        self.quantization: Mapping[str, Any] = next(
            (value for value in settings if isinstance(value, dict)), {}
        )
        text_config = config.get("text_config")
        fields = {**config, **(text_config if isinstance(text_config, dict) else {})}
        self._widths = {value for value in fields.values() if type(value) is int}
        self._default = self._find_default(fields.get("hidden_size"))

    def _find_default(self, hidden: Any) -> list[Any]:
        """Bits and group size of modules that are not named: what the first tensors of a known
        width say, otherwise what the configuration claims."""
        claimed = [self.quantization.get(name) for name in ("bits", "group_size")]
        for name in self.tensors:
            module, _, leaf = name.rpartition(".")
            is_known = module.endswith(_READ_HIDDEN) and module not in self.quantization
            if is_known and leaf == "scales" and self.is_packed(module):
                found = (pair for pair, columns in self._fitting(module) if columns == hidden)
                return next(found, claimed)
        return claimed

    def is_packed(self, module: str) -> bool:
        """True when the module's weight is quantized as MLX does it."""
        weight = self.tensors.get(f"{module}.weight")
        scales = self.tensors.get(f"{module}.scales")
        return (
            weight is not None
            and scales is not None
            and weight.dtype == "U32"
            and len(weight.shape) == len(scales.shape) >= 2
            and weight.shape[:-1] == scales.shape[:-1]
        )

    def possible_columns(self, module: str) -> list[int]:
        """Lengths that the last axis of the weight may have, the likeliest first.

        There are several when only the model can tell: mlx-lm, too, takes the width of a quantized
        weight from the model where the configuration does not name the module. Empty when nothing
        is known.
        """
        weight = self.tensors.get(f"{module}.weight")
        if weight is None or len(weight.shape) < 2:
            return []
        if not self.is_packed(module):
            is_opaque = weight.dtype.startswith(("U", "I", "F4", "F6"))
            return [] if is_opaque else [weight.shape[-1]]
        own = self.quantization.get(module)
        default = self._default
        if isinstance(own, dict):
            default = [own.get("bits"), own.get("group_size")]
        fitting = self._fitting(module)
        as_declared = [columns for pair, columns in fitting if pair == default]
        if as_declared and isinstance(own, dict):
            return as_declared
        others = sorted(
            (columns for _, columns in fitting), key=lambda columns: columns not in self._widths
        )
        return as_declared + others

    def _fitting(self, module: str) -> list[tuple[list[int], int]]:
        """Bits and group sizes with which a packed weight has these shapes, and its columns."""
        words = self.tensors[f"{module}.weight"].shape[-1]
        scales = self.tensors[f"{module}.scales"]
        return [
            ([bits, size], scales.shape[-1] * size)
            for bits in MLX_BITS
            for size in MLX_GROUP_SIZES
            if scales.shape[-1] * size * bits == words * 32
            # mxfp4, mxfp8 and nvfp4 have scales of a byte, and one group size each.
            and (scales.dtype != "U8" or (bits, size) in ((4, 16), (4, 32), (8, 32)))
        ]

    def packing(self, module: str) -> tuple[int, int | None]:
        """Bits and group size of the module's weight; no group size when MLX did not quantize it.

        They are what the tensors are, which is not always what the configuration says.
        """
        weight = self.tensors[f"{module}.weight"]
        columns = self.possible_columns(module)
        if not self.is_packed(module) or not columns:
            return _BITS_BY_DTYPE.get(weight.dtype, 32), None
        groups = self.tensors[f"{module}.scales"].shape[-1]
        return weight.shape[-1] * 32 // columns[0], columns[0] // groups

    def num_weights(self, module: str) -> int:
        """Numbers in the module's weight, unpacked."""
        weight = self.tensors[f"{module}.weight"]
        if not self.is_packed(module):
            return weight.size
        columns = self.possible_columns(module)
        return prod(weight.shape[:-1]) * (columns[0] if columns else 0)

    def leading(self, module: str) -> tuple[int, ...]:
        """All axes of the weight but the last: `(out,)`, or `(experts, out)`; () when unknown."""
        weight = self.tensors.get(f"{module}.weight")
        known = weight is not None and bool(self.possible_columns(module))
        return weight.shape[:-1] if weight is not None and known else ()

    def num_parameters(self) -> int:
        """Weights as the model counts them: unpacked, without scales and zero points."""
        total = 0
        for name, tensor in self.tensors.items():
            module, _, leaf = name.rpartition(".")
            if leaf == "weight":
                total += self.num_weights(module)
            elif leaf == "qweight":
                bits = self.quantization.get("bits")
                total += tensor.size * 32 // (bits if bits in MLX_BITS else 4)
            elif name.endswith((".weight_packed", "_blocks")):
                total += tensor.size * (8 if tensor.dtype == "I32" else 2)
            elif not name.endswith(_QUANTIZATION_PARTS):
                total += tensor.size
        return total
