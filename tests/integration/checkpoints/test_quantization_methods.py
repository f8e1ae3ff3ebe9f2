"""Every method of quantization that Transformers knows: mlx-lm computes with it, or it is refused
by name with what to do. `engine/test_quantized_formats` has the values of those that are served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlops.checkpoints import recognise
from mlops.errors import PackagingError
from tiny_models import write_safetensors

CONFIG: dict[str, Any] = {
    "model_type": "phi3",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 10,
}
LAYER = "model.layers.0.self_attn.o_proj"
LEFT_TO_BUILDING = {"mxfp4", "mxfp8", "bitnet"}
"""Their tensors' names and shapes tell."""


def write(
    folder: Path,
    settings: Any,
    tensors: dict[str, tuple[int, ...]],
    dtype: str = "I32",
    **other: Any,
) -> Path:
    write_safetensors(folder / "model.safetensors", tensors, dtype=dtype)
    config = CONFIG | ({"quantization_config": settings} if settings is not None else {}) | other
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(PackagingError) as caught:
        recognise(folder)
    assert "\n" not in caught.value.message
    assert caught.value.operation == "recognise"
    return caught.value.message


def methods() -> list[str]:
    from transformers.utils.quantization_config import QuantizationMethod

    return sorted(method.value for method in QuantizationMethod)


def test_every_method_of_transformers(tmp_path: Path) -> None:
    assert {"bitsandbytes", "hqq", "torchao", "awq"} <= set(methods())
    for method in methods():
        write(tmp_path, {"quant_method": method, "bits": 3}, {f"{LAYER}.weight": (4, 4)})
        if method in LEFT_TO_BUILDING:
            recognise(tmp_path)
            continue
        message = refused(tmp_path)
        assert method in message.lower().replace(" ", "_"), message
        assert "mlx_lm.convert -q" in message


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128}
AWQ_TENSORS = {f"{LAYER}.qweight": (64, 8), f"{LAYER}.scales": (2, 64)}
GROUPS = {"g": {"weights": {"num_bits": 8, "symmetric": True}}}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
DEEPSEEK = {"model_type": "deepseek_v3"}


@pytest.mark.parametrize(
    ("settings", "other", "problem"),
    [
        (AWQ | {"bits": 8}, {}, "mlx-lm reads 4 bits of it, not 8"),
        (AWQ | {"group_size": -1}, {}, "groups of 32, 64 or 128 weights, not -1"),
        (AWQ | {"group_size": True}, {}, "groups of 32, 64 or 128 weights, not True"),
        (AWQ | {"version": "GEMV"}, {}, "reads AutoAWQ's gemm layout, not autoawq gemv"),
        (AWQ | {"version": "marlin"}, {}, "reads AutoAWQ's gemm layout, not autoawq marlin"),
        (AWQ | {"backend": "llm-awq"}, {}, "reads AutoAWQ's gemm layout, not llm-awq gemm"),
        (AWQ | {"quant_method": "gptq"}, {}, "in AWQ's order, which is not GPTQ's"),
        (PACKED, {}, "does not read pack-quantized weights for phi3"),
        (PACKED | {"config_groups": GROUPS}, DEEPSEEK, "symmetric 4-bit weights of it alone"),
        (PACKED | {"format": "float-quantized"}, {}, "not float-quantized"),
        (PACKED | {"format": "int-quantized"}, DEEPSEEK, "not int-quantized"),
        (PACKED | {"format": "sparse-24-bitmask"}, {}, "not sparse-24-bitmask"),
        (PACKED | {"format": None}, {}, "not None"),
        (FP8, {}, "mlx-lm does not dequantize it for phi3"),
        (FP8, {"model_type": "ministral3"}, "mlx-lm does not dequantize it for ministral3"),
        (FP8 | {"weight_block_size": [64, 64]}, DEEPSEEK, "blocks of 128 by 128 weights, not [64"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, {}, "knows NVFP4 of it, not FP8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, {}, "NVFP4 weights for phi3"),
        ({"load_in_4bit": True}, {}, "quantized with bitsandbytes"),
        ({"quant_method": ["awq"]}, {}, "quantized with an unnamed method"),
        ({"quant_method": "x\ny" * 99}, {}, "mlx-lm cannot compute with it"),
    ],
)
def test_what_mlx_lm_reads_otherwise(
    tmp_path: Path, settings: dict[str, Any], other: dict[str, Any], problem: str
) -> None:
    write(tmp_path, settings, AWQ_TENSORS, **other)
    message = refused(tmp_path)
    assert problem in message
    assert "give the weights before they were quantized" in message


@pytest.mark.parametrize("tensor", [f"{LAYER}.g_idx", "model.layers.0.mlp.act.scales"])
def test_awq_with_tensors_that_mlx_lm_would_leave_out(tmp_path: Path, tensor: str) -> None:
    write(tmp_path, AWQ, {**AWQ_TENSORS, tensor: (64,)})
    assert "quantized with AWQ" in refused(tmp_path)


def test_awq_as_autoawq_writes_it(tmp_path: Path) -> None:
    found = recognise(write(tmp_path, AWQ | {"version": "gemm"}, AWQ_TENSORS))
    assert "4-bit AWQ quantized phi3" in found.description


@pytest.mark.parametrize("place", ["text_config", "hf_quant_config.json"])
def test_settings_in_the_other_places_that_mlx_lm_reads(tmp_path: Path, place: str) -> None:
    settings = {"quant_method": "hqq"}
    if place == "text_config":
        write(tmp_path, None, AWQ_TENSORS, text_config={"quantization_config": settings})
    else:
        write(tmp_path, None, AWQ_TENSORS)
        (tmp_path / place).write_text(json.dumps(settings))
    message = refused(tmp_path)
    assert "quantized with hqq" in message
    assert place in message


@pytest.mark.parametrize(
    "part", ["absmax", "quant_map", "nested_absmax", "quant_state.bitsandbytes__nf4", "SCB"]
)
@pytest.mark.parametrize("settings", [None, {"quant_method": "bitsandbytes", "load_in_4bit": True}])
def test_bitsandbytes_is_known_by_its_side_tensors(
    tmp_path: Path, part: str, settings: dict[str, Any] | None
) -> None:
    write(tmp_path, settings, {f"{LAYER}.weight": (64, 1), f"{LAYER}.weight.{part}": (2,)})
    message = refused(tmp_path)
    assert "quantized with bitsandbytes" in message
    assert "give the weights before they were quantized" in message


@pytest.mark.parametrize(
    ("name", "dtype"), [("qweight", "I32"), ("weight_packed", "I32"), ("weight", "F8_E4M3")]
)
def test_quantized_tensors_whose_settings_are_lost(tmp_path: Path, name: str, dtype: str) -> None:
    shape = (64, 2) if dtype.startswith("F8") else (64, 8)
    write(tmp_path, None, {f"{LAYER}.{name}": shape}, dtype="I32")
    if dtype != "I32":
        path = tmp_path / "model.safetensors"
        raw = path.read_bytes().replace(b'"I32", "shape": [64, 2]', b'"F8_E4M3", "shape": [64, 8]')
        size = len(raw) - 8 - 4 * 64 * 2
        path.write_bytes(size.to_bytes(8, "little") + raw[8:])
    assert "config.json has no quantization_config" in refused(tmp_path)


def test_settings_that_were_left_over(tmp_path: Path) -> None:
    """Merged to 16 bits, and saved with the config of the model that was trained on."""
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    found = recognise(write(tmp_path, settings, {f"{LAYER}.weight": (64, 64)}, dtype="F32"))
    assert found.quantization is None
    assert found.model_config["quantization_config"] is None
    (warning,) = found.warnings
    assert (
        "says that the weights are quantized (bitsandbytes), but all of them are plain" in warning
    )


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ([4], "'[4]', not an object"),
        ({}, "has bits 'None'"),
        ({"bits": 4}, "has group_size 'None'"),
        ({"bits": [4], "group_size": {}}, "has bits '[4]'"),
        ({"bits": 4, "group_size": 0}, "has group_size '0', and mlx-lm knows 16, 32, 64, 128"),
        ({"bits": True, "group_size": 32}, "has bits 'True'"),
        ({"bits": 7, "group_size": 32}, "has bits '7'"),
        ({"bits": 4, "group_size": 32, "mode": "int4"}, "has mode 'int4'"),
        ({"bits": 4, "group_size": 32, "lm_head": {"group_size": 0}}, "'0' for lm_head"),
    ],
)
def test_settings_that_mlx_would_end_the_process_for(
    tmp_path: Path, settings: Any, problem: str
) -> None:
    write(tmp_path, None, {f"{LAYER}.weight": (64, 8)}, dtype="U32", quantization=settings)
    assert problem in refused(tmp_path)
