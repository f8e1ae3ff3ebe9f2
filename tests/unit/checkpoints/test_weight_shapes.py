"""What the shapes of packed weights mean, where several readings fit."""

from __future__ import annotations

from typing import Any

from mlops.checkpoints.checkpoint import TensorInfo
from mlops.checkpoints.tensors import WeightShapes

QWEN3 = {"hidden_size": 1024, "num_attention_heads": 16, "head_dim": 128}


def packed(rows: int, columns: int, bits: int = 4, group_size: int = 64) -> dict[str, TensorInfo]:
    def tensor(dtype: str, width: int) -> TensorInfo:
        return TensorInfo(dtype, (rows, width), "model.safetensors", 0, 4 * rows * width)

    return {
        "o_proj.weight": tensor("U32", columns * bits // 32),
        "o_proj.scales": tensor("BF16", columns // group_size),
        "o_proj.biases": tensor("BF16", columns // group_size),
    }


def shapes(tensors: dict[str, TensorInfo], **quantization: Any) -> WeightShapes:
    return WeightShapes(tensors, QWEN3 | {"quantization": quantization})


def test_what_config_json_says_is_read_where_it_fits() -> None:
    """As 8 bits in groups of 32 it would be as wide as the model, which it is not."""
    found = shapes(packed(1024, 2048), bits=4, group_size=64)
    assert found.packing("o_proj") == (4, 64)
    assert found.num_parameters() == 1024 * 2048


def test_a_width_of_the_model_is_likeliest_where_it_does_not_fit() -> None:
    found = shapes(packed(64, 1024, bits=8, group_size=32), bits=4, group_size=128)
    assert found.packing("o_proj") == (8, 32)
