"""A llama of a few KB, written without MLX: what a test of file names needs, in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiny_models import write_safetensors

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 10,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}
Q = "model.layers.0.self_attn.q_proj"


def llama_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of all its tensors by name."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (10, 8),
        "model.norm.weight": (8,),
        "lm_head.weight": (10, 8),
    }
    for number in range(2):
        layer = f"model.layers.{number}"
        found |= {
            f"{layer}.input_layernorm.weight": (8,),
            f"{layer}.post_attention_layernorm.weight": (8,),
            f"{layer}.self_attn.q_proj.weight": (8, 8),
            f"{layer}.self_attn.k_proj.weight": (4, 8),
            f"{layer}.self_attn.v_proj.weight": (4, 8),
            f"{layer}.self_attn.o_proj.weight": (8, 8),
            f"{layer}.mlp.gate_proj.weight": (16, 8),
            f"{layer}.mlp.up_proj.weight": (16, 8),
            f"{layer}.mlp.down_proj.weight": (8, 16),
        }
    return found


def write_llama(folder: Path, *, num_shards: int = 1, with_index: bool = False) -> Path:
    """Write the model: `model.safetensors` or shards, an index where asked for, a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = write_shards(folder, "model", num_shards)
    if with_index:
        write_index(folder, weight_map)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def write_shards(folder: Path, prefix: str, num_shards: int, *, fill: int = 1) -> dict[str, str]:
    """Write all its tensors to so many files; returns which file has which tensor."""
    names = list(llama_shapes())
    weight_map = {}
    for number in range(num_shards):
        file = f"{prefix}-{number + 1:05}-of-{num_shards:05}.safetensors"
        if num_shards == 1:
            file = f"{prefix}.safetensors"
        part = names[number::num_shards]
        write_safetensors(folder / file, {name: llama_shapes()[name] for name in part}, fill=fill)
        weight_map |= dict.fromkeys(part, file)
    return weight_map


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    """Write `model.safetensors.index.json`."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_plain_adapter(folder: Path, *, peft: bool = True) -> Path:
    """Write an adapter of one module for that model."""
    folder.mkdir(parents=True, exist_ok=True)
    if peft:
        config: dict[str, Any] = {"peft_type": "LORA", "lora_alpha": 4, "r": 2}
        key = f"base_model.model.{Q}"
        tensors = {f"{key}.lora_A.weight": (2, 8), f"{key}.lora_B.weight": (8, 2)}
        write_safetensors(folder / "adapter_model.safetensors", tensors)
    else:
        config = {"lora_parameters": {"scale": 1.0}}
        tensors = {f"{Q}.lora_a": (8, 2), f"{Q}.lora_b": (2, 8)}
        write_safetensors(folder / "adapters.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
