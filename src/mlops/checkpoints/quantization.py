"""How a checkpoint's weights are quantized: said truthfully, or refused where mlx-lm cannot compute
with them.

What mlx-lm does not know it passes over (`load_model` in `mlx_lm/utils.py` has no last `else`), and
some of what it takes it reads with one layout only. Both would be answered wrongly or fail when
served, so every method is either known here to be right or refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlops.checkpoints.checkpoint import TensorInfo
from mlops.checkpoints.files import CheckpointFile, read_json
from mlops.checkpoints.library_sources import mlx_lm_mentions
from mlops.checkpoints.refusal import examples, refusal
from mlops.checkpoints.tensors import MLX_BITS, MLX_GROUP_SIZES, WeightShapes

HF_QUANT_CONFIG = "hf_quant_config.json"
"""Where NVIDIA's ModelOpt writes its settings when `config.json` has none."""

MLX_MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
SHARE_WORTH_A_WORD = 0.01
"""Of the weights: a width that fewer are stored with (an expert's router) is not mentioned."""

_BITSANDBYTES_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB")
_PARTS = (*_BITSANDBYTES_PARTS, ".qweight", ".qzeros", ".weight_packed", "_blocks")
_PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")
_CONVERT = (
    "give the weights before they were quantized (bfloat16 or float16), and quantize those with "
    "`mlx_lm.convert -q` if they are to be small"
)
_NAMES = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FBGEMM FP8",
    "compressed-tensors": "compressed-tensors",
    "modelopt": "ModelOpt",
}


@dataclass(frozen=True)
class Quantization:
    """What is known of how a checkpoint is quantized.

    Attributes:
        summary: `Checkpoint.quantization`: `bits` (the commonest), `group_size`, `mode`, where
            they are known; `bits_per_weight` over all weights, scales counted; `mixed_bits`, where
            several widths are used. None for plain weights.
        model_config: for `Checkpoint.model_config`.
        warnings: for `Checkpoint.warnings`.
    """

    summary: dict[str, Any] | None = None
    model_config: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def read_quantization(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    files: Mapping[str, CheckpointFile],
) -> Quantization:
    """Find out how the weights are quantized.

    Raises:
        PackagingError: the settings are none, or mlx-lm cannot compute with weights like these.
    """
    _refuse_bitsandbytes(path, tensors)
    if config.get("quantization") is not None:
        settings = config["quantization"]
        _check_mlx_settings(path, settings)
        return Quantization(_summary(config, tensors, settings.get("mode", "affine")))
    place, settings = _find_settings(path, config, files)
    if not settings:
        _refuse_unexplained(path, tensors)
        return Quantization()
    method = _method(settings)
    if not _is_quantized(tensors):
        warning = (
            f"{place} says that the weights are quantized ({method}), but all of them are plain: "
            "that setting is passed over"
        )
        return Quantization(model_config={"quantization_config": None}, warnings=(warning,))
    if settings.get("bits") is not None and "quant_method" not in settings:
        # mlx-lm writes its own settings under both names, and older versions under this one.
        _check_mlx_settings(path, settings)
        return Quantization(
            _summary(config, tensors, settings.get("mode", "affine")),
            model_config={"quantization": settings},
        )
    if problem := _problem(method, settings, config, tensors):
        raise refusal(
            f"{path} is quantized with {_NAMES.get(method, method)} ({place}), and {problem}: "
            f"{_CONVERT}",
            path,
            quant_method=method,
        )
    return Quantization(_summary(config, tensors, _mode(method, settings), settings))


def describe_quantization(quantization: Mapping[str, Any] | None) -> str:
    """In words: `4-bit`, `4-bit mxfp4`, `mixed 4/6-bit (4.8 bits per weight)`; "" for None."""
    if quantization is None:
        return ""
    mode = quantization.get("mode")
    suffix = "" if mode in (None, "affine") else f" {_NAMES.get(mode, mode)}"
    if mixed := quantization.get("mixed_bits"):
        widths = "/".join(str(bits) for bits in mixed)
        return f"mixed {widths}-bit{suffix} ({quantization['bits_per_weight']} bits per weight)"
    bits = quantization.get("bits")
    return f"{bits}-bit{suffix}" if isinstance(bits, int) else suffix.strip()


def _refuse_bitsandbytes(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Its side tensors tell, also where `config.json` has lost its quantization_config."""
    found = [
        name for name in tensors if name.endswith(_BITSANDBYTES_PARTS) or ".quant_state." in name
    ]
    if found:
        raise refusal(
            f"{path} is quantized with bitsandbytes ({examples(sorted(found), 1)}), which computes "
            f"on CUDA alone: {_CONVERT}; an adapter can be packaged with those as its base",
            path,
            quant_method="bitsandbytes",
            tensors=sorted(found)[:10],
        )


def _find_settings(
    path: Path, config: Mapping[str, Any], files: Mapping[str, CheckpointFile]
) -> tuple[str, dict[str, Any]]:
    """The settings that mlx-lm reads, and where they stand; it looks in this order."""
    text_config = config.get("text_config")
    place, settings = "quantization_config in config.json", config.get("quantization_config")
    if "quantization_config" not in config and isinstance(text_config, dict):
        place = "text_config.quantization_config in config.json"
        settings = text_config.get("quantization_config")
    if settings is None and "quantization_config" not in config and HF_QUANT_CONFIG in files:
        place, settings = HF_QUANT_CONFIG, read_json(files[HF_QUANT_CONFIG])
        settings.setdefault("quant_method", None)
    if settings and not isinstance(settings, dict):
        raise refusal(f"{place} of {path} is not an object: use the file of the model", path)
    return place, settings or {}


def _method(settings: Mapping[str, Any]) -> str:
    """Of `quantization_config`; bitsandbytes' first versions left it out."""
    method = settings.get("quant_method")
    if isinstance(method, str):
        return method.lower()[:80]
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    if isinstance(settings.get("quantization"), dict) or "quant_algo" in settings:
        return "modelopt"
    return "an unnamed method"


def _is_quantized(tensors: Mapping[str, TensorInfo]) -> bool:
    return any(
        name.endswith(_PARTS)
        or (tensor.dtype not in _PLAIN_DTYPES and name.endswith(("weight", "_proj")))
        for name, tensor in tensors.items()
    )


def _refuse_unexplained(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Quantized tensors without settings. MLX's own are found by `consistency`."""
    packed = sorted(
        name
        for name, tensor in tensors.items()
        if name.endswith((".qweight", ".weight_packed"))
        or tensor.dtype.startswith("F8")
        or (tensor.dtype in ("I8", "U8") and name.endswith(".weight"))
    )
    if packed:
        raise refusal(
            f"{path} has quantized tensors ({examples(packed)}), but config.json has no "
            "quantization_config: use the config.json that was saved with them",
            path,
            tensors=packed[:10],
        )


def _check_mlx_settings(path: Path, settings: Any) -> None:
    """Values that MLX cannot take: it divides by a group size of 0, which ends the process."""
    if not isinstance(settings, dict):
        raise refusal(
            f"quantization in config.json of {path} is {str(settings)[:80]!r}, not an object: use "
            "the config.json that was saved with the weights",
            path,
        )
    of_modules = [(name, own) for name, own in settings.items() if isinstance(own, dict)]
    for module, own in [("", settings), *of_modules]:
        allowed = {"bits": MLX_BITS, "group_size": MLX_GROUP_SIZES, "mode": MLX_MODES}
        for name, values in allowed.items():
            value = own.get(name)
            is_set = name in own or (not module and name != "mode")
            # A bool is an int that equals 0 or 1.
            if is_set and (isinstance(value, bool) or value not in values):
                raise refusal(
                    f"quantization in config.json of {path} has {name} {str(value)[:80]!r}"
                    f"{f' for {module[:200]}' if module else ''}, and mlx-lm knows "
                    f"{', '.join(map(str, values))}: use the config.json that was saved with the "
                    "weights",
                    path,
                    key=name,
                )


def _problem(
    method: str,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
) -> str | None:
    """Why mlx-lm cannot compute with weights of this method; None when it can."""
    if method == "awq":
        return _awq_problem(settings, tensors)
    if method in _PROBLEMS:
        return _PROBLEMS[method](settings, config)
    return "mlx-lm cannot compute with it"


def _awq_problem(settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str | None:
    version = str(settings.get("version") or "gemm").lower()
    backend = str(settings.get("backend") or "autoawq").lower()
    group_size = settings.get("group_size", 128)
    if settings.get("bits", 4) != 4:
        return f"mlx-lm reads 4 bits of it, not {str(settings.get('bits'))[:80]}"
    if isinstance(group_size, bool) or group_size not in MLX_GROUP_SIZES[1:]:
        return f"MLX has groups of 32, 64 or 128 weights, not {str(group_size)[:80]}"
    if version != "gemm" or backend != "autoawq":
        return f"mlx-lm reads AutoAWQ's gemm layout, not {backend} {version}"[:200]
    for name in tensors:
        if name.endswith(".g_idx"):
            return "mlx-lm does not read groups in another order (g_idx)"
        module = name.removesuffix(".scales")
        if module != name and f"{module}.qweight" not in tensors:
            return f"mlx-lm would leave out {name[:200]}, which scales activations"
    return None


def _gptq_problem(settings: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    return "mlx-lm reads such weights in AWQ's order, which is not GPTQ's"


def _fp8_problem(settings: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    block = settings.get("weight_block_size")
    if settings.get("scale_fmt") == "ue8m0" and block == [32, 32]:
        return None  # MLX's own mxfp8
    if not mlx_lm_mentions(config, "from_fp8"):
        return f"mlx-lm does not dequantize it for {config['model_type']}"
    if block not in (None, [128, 128]):
        return f"mlx-lm dequantizes blocks of 128 by 128 weights, not {str(block)[:80]}"
    return None


def _compressed_tensors_problem(
    settings: Mapping[str, Any], config: Mapping[str, Any]
) -> str | None:
    kind = settings.get("format")
    known = ("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
    if kind not in known:
        return f"mlx-lm knows {', '.join(known)} of it, not {str(kind)[:80]}"
    if not mlx_lm_mentions(config, "weight_packed"):
        return f"mlx-lm does not read {kind} weights for {config['model_type']}"
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or kind != "pack-quantized":
            continue
        # mlx-lm takes 8 for the zero point of every weight.
        if weights.get("num_bits") != 4 or weights.get("symmetric") is False:
            return "mlx-lm reads symmetric 4-bit weights of it alone"
        if weights.get("actorder") not in (None, False, "weight", "static"):
            return "mlx-lm does not read groups in another order (actorder)"
    return None


def _modelopt_problem(settings: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    inner = settings.get("quantization")
    algorithm = (inner if isinstance(inner, dict) else settings).get("quant_algo")
    if algorithm != "NVFP4":
        return f"mlx-lm knows NVFP4 of it, not {str(algorithm)[:80]}"
    if settings.get("quant_method") is None:
        return f"mlx-lm does not read {HF_QUANT_CONFIG} without quant_method"
    if not mlx_lm_mentions(config, "weight_scale_2"):
        return f"mlx-lm does not read NVFP4 weights for {config['model_type']}"
    return None


def _left_to_building(settings: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """Names and shapes tell, when the model is built."""
    return None


_PROBLEMS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], str | None]] = {
    "gptq": _gptq_problem,
    "fp8": _fp8_problem,
    "compressed-tensors": _compressed_tensors_problem,
    "modelopt": _modelopt_problem,
    "mxfp4": _left_to_building,
    "mxfp8": _left_to_building,
    "bitnet": _left_to_building,
}


def _mode(method: str, settings: Mapping[str, Any]) -> str:
    if method == "compressed-tensors" and settings.get("format") != "pack-quantized":
        return str(settings.get("format")).removesuffix("-pack-quantized")
    return "nvfp4" if method == "modelopt" else method


def _summary(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    mode: str,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """What the tensors are, whatever the settings say; None when none of them is quantized."""
    shapes = WeightShapes(tensors, config)
    weights_by_packing: Counter[tuple[int, int | None]] = Counter()
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and len(tensor.shape) >= 2:
            weights_by_packing[shapes.packing(module)] += shapes.num_weights(module)
    packed = {key: number for key, number in weights_by_packing.items() if key[1] is not None}
    num_parameters = shapes.num_parameters()
    summary: dict[str, Any]
    if packed:
        bits, group_size = max(packed, key=lambda key: packed[key])
        summary = {"bits": bits, "group_size": group_size, "mode": mode}
    elif settings is not None:
        bits = {"fp8": 8, "mxfp8": 8, "bitnet": 2}.get(mode, settings.get("bits", 4))
        summary = {"bits": bits, "group_size": settings.get("group_size"), "mode": mode}
    else:
        return None
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    summary["bits_per_weight"] = round(8 * num_bytes / max(1, num_parameters), 1)
    enough = SHARE_WORTH_A_WORD * sum(weights_by_packing.values())
    widths = sorted({key[0] for key, number in weights_by_packing.items() if number > enough})
    if packed and len(widths) > 1:
        summary["mixed_bits"] = widths
    return summary
