"""Tiny random models, adapters and tokenizers for the tests, in the formats that real ones have.

They are made with mlx-lm's own model classes, so `mlx_lm.load` loads them; each takes well under a
second and some 100 KB. The same arguments give the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlops.hardware.open_files import open_file_limit_kept

SPECIAL_TOKENS = ("<|pad|>", "<|start|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def write_language_model(
    folder: str | Path,
    *,
    architecture: str = "llama",
    hidden: int = 32,
    layers: int = 2,
    vocab: int | None = None,
    quantize_bits: int | None = None,
    shards: int = 1,
    dtype: str = "float32",
    seed: int = 0,
    with_tokenizer: bool = True,
    tie_word_embeddings: bool = False,
    metadata_format: str = "mlx",
) -> Path:
    """Write a language model with random weights; returns its folder.

    Args:
        architecture: a `model_type` that mlx-lm has: llama, qwen2, qwen3, gemma2, gemma3_text,
            mixtral, olmoe, qwen3_moe, gpt_oss, phi3, seed_oss, gpt2; sliding windows of 8 tokens:
            gemma3_text; state-space and hybrid: mamba2, lfm2, qwen3_next.
        hidden: hidden size, a multiple of 32.
        vocab: rows of the embedding; by default as many as the tokenizer has tokens.
        quantize_bits: quantize with groups of 32.
        shards: number of weight files.
        metadata_format: what the files say they were saved by: `mlx` or `pt`.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map

    with open_file_limit_kept():
        from mlx_lm.utils import _get_classes, quantize_model, save_config

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(architecture, hidden, layers, vocab or vocabulary_size(), tie_word_embeddings)

    mx.random.seed(seed)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    model.update(tree_map(lambda array: array.astype(getattr(mx, dtype)), model.parameters()))
    if quantize_bits is not None:
        model, config = quantize_model(model, config, group_size=32, bits=quantize_bits)

    weights = dict(sorted(tree_flatten(model.parameters())))
    mx.eval(weights)
    names = list(weights)
    per_shard = math.ceil(len(names) / shards)
    weight_map = {}
    for number in range(shards):
        part = names[number * per_shard : (number + 1) * per_shard]
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        if shards == 1:
            file = "model.safetensors"
        mx.save_safetensors(
            str(folder / file),
            {name: weights[name] for name in part},
            metadata={"format": metadata_format},
        )
        weight_map.update(dict.fromkeys(part, file))
    total_size = sum(array.nbytes for array in weights.values())
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total_size}, "weight_map": weight_map},
    )
    save_config(config, folder / "config.json")
    if with_tokenizer:
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder: str | Path) -> Path:
    """Write a byte-level BPE tokenizer (one token per byte) with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "<|pad|>",
            "eos_token": "<|end|>",
            "model_max_length": 1024,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    return folder


def vocabulary_size() -> int:
    """Tokens of the tokenizer that `write_tokenizer` writes."""
    return 256 + len(SPECIAL_TOKENS)


def write_lora_adapter(
    folder: str | Path,
    base: str | Path,
    *,
    rank: int = 4,
    scale: float = 2.0,
    keys: Sequence[str] | None = None,
    num_layers: int = -1,
    dora: bool = False,
    seed: int = 1,
    base_reference: str | None = None,
    zero: bool = False,
) -> Path:
    """Write an adapter for the model in `base` as mlx-lm's trainer does; returns its folder.

    Args:
        keys: modules within a layer (`self_attn.q_proj`), or of the model (`lm_head`,
            `model.embed_tokens`); every linear of the layers when None.
        num_layers: how many of the last layers; 0 or less is all.
        base_reference: what the adapter says its base is; by default the path of `base`.
        zero: leave B at zero, as before training: such an adapter changes nothing.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    with open_file_limit_kept():
        from mlx_lm.tuner.utils import linear_to_lora_layers
        from mlx_lm.utils import load_model

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model, _ = load_model(Path(base), lazy=True)
    model.freeze()
    mx.random.seed(seed)
    parameters: dict[str, Any] = {"rank": rank, "scale": scale, "dropout": 0.0}
    if keys is not None:
        parameters["keys"] = list(keys)
    linear_to_lora_layers(model, num_layers, parameters, use_dora=dora)
    weights = dict(sorted(tree_flatten(model.trainable_parameters())))
    for name, array in weights.items():
        if name.endswith(".lora_b") and not zero:
            weights[name] = mx.random.normal(array.shape) * 0.2
        elif name.endswith(".m") and not zero:
            weights[name] = array * mx.random.uniform(0.8, 1.2, array.shape)
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    _write_json(
        folder / "adapter_config.json",
        {
            "fine_tune_type": "dora" if dora else "lora",
            "num_layers": num_layers,
            "lora_parameters": parameters,
            "model": base_reference or str(base),
        },
    )
    return folder


def write_peft_adapter(
    folder: str | Path,
    base: str | Path,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
    use_rslora: bool = False,
    dora: bool = False,
    alpha_pattern: dict[str, float] | None = None,
    rank_pattern: dict[str, int] | None = None,
    seed: int = 2,
    base_reference: str | None = None,
) -> Path:
    """Write an adapter for the model in `base` as Hugging Face PEFT does; returns its folder.

    Args:
        target_modules: last parts of the names of the linear layers to adapt.
        rank_pattern, alpha_pattern: other ranks and alphas, by module name.
    """
    import mlx.core as mx
    from mlx import nn

    with open_file_limit_kept():
        from mlx_lm.utils import load_model

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model, _ = load_model(Path(base), lazy=True)
    mx.random.seed(seed)
    weights = {}
    for name, module in sorted(model.named_modules(), key=lambda item: item[0]):
        if name.rpartition(".")[2] not in target_modules:
            continue
        if not isinstance(module, nn.Linear | nn.QuantizedLinear):
            continue
        weight = module.weight
        if isinstance(module, nn.QuantizedLinear):
            weight = mx.dequantize(
                weight, module.scales, module.biases, module.group_size, module.bits
            )
        num_out, num_in = weight.shape
        own_rank = next((r for key, r in (rank_pattern or {}).items() if name.endswith(key)), rank)
        prefix = f"base_model.model.{name}"
        weights[f"{prefix}.lora_A.weight"] = mx.random.normal((own_rank, num_in)) * num_in**-0.5
        weights[f"{prefix}.lora_B.weight"] = mx.random.normal((num_out, own_rank)) * 0.2
        if dora:
            norm = mx.linalg.norm(weight.astype(mx.float32), axis=1)
            weights[f"{prefix}.lora_magnitude_vector"] = norm * mx.random.uniform(
                0.8, 1.2, norm.shape
            )
    mx.save_safetensors(
        str(folder / "adapter_model.safetensors"), weights, metadata={"format": "pt"}
    )
    _write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_reference or str(base),
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": 0.0,
            "target_modules": list(target_modules),
            "use_rslora": use_rslora,
            "use_dora": dora,
            "rank_pattern": rank_pattern or {},
            "alpha_pattern": alpha_pattern or {},
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "modules_to_save": None,
            "layer_replication": None,
            "inference_mode": True,
        },
    )
    return folder


def write_safetensors(
    path: str | Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    metadata: Mapping[str, str] | None = None,
    fill: int = 1,
    dtype: str = "F32",
) -> Path:
    """Write a safetensors file by hand (no MLX): every byte of its 4-byte elements is `fill`."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata is not None else {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    path = Path(path)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes([fill]) * end)
    return path


def write_hollow_llama(folder: str | Path, head_dim: int) -> int:
    """Write a one-layer Llama of two terabytes whose weights are a hole in the file: whoever reads
    them does not come back, nor has the memory. Returns the bytes of its weights.

    Args:
        head_dim: of each of two query heads and one key head.
    """
    folder = Path(folder)
    write_language_model(folder, layers=1)
    config = json.loads((folder / "config.json").read_text())
    width, rows = 2**20, 2**18
    sizes = {"hidden_size": width, "vocab_size": rows, "head_dim": head_dim, "intermediate_size": 2}
    (folder / "config.json").write_text(json.dumps(config | sizes))
    (folder / "model.safetensors.index.json").unlink()
    shapes = {
        "model.embed_tokens": [rows, width],
        "lm_head": [rows, width],
        "model.norm": [width],
        "model.layers.0.input_layernorm": [width],
        "model.layers.0.post_attention_layernorm": [width],
        "model.layers.0.self_attn.q_proj": [2 * head_dim, width],
        "model.layers.0.self_attn.k_proj": [head_dim, width],
        "model.layers.0.self_attn.v_proj": [head_dim, width],
        "model.layers.0.self_attn.o_proj": [width, 2 * head_dim],
        "model.layers.0.mlp.gate_proj": [2, width],
        "model.layers.0.mlp.up_proj": [2, width],
        "model.layers.0.mlp.down_proj": [width, 2],
    }
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[f"{name}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return end


def _config(
    architecture: str, hidden: int, layers: int, vocab: int, tie_word_embeddings: bool
) -> dict[str, Any]:
    if architecture == "gpt2":
        return {
            "model_type": "gpt2",
            "n_ctx": 1024,
            "n_embd": hidden,
            "n_head": 2,
            "n_layer": layers,
            "n_positions": 1024,
            "layer_norm_epsilon": 1e-5,
            "vocab_size": vocab,
            "bos_token_id": None,
            "eos_token_id": min(vocabulary_size(), vocab) - 1,
        }
    config: dict[str, Any] = {
        "model_type": architecture,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": 2,
        "num_key_value_heads": 2 if architecture == "phi3" else 1,
        "head_dim": hidden // 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocab,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tie_word_embeddings,
        "pad_token_id": min(256, vocab - 1),
        "bos_token_id": None,
        "eos_token_id": min(vocabulary_size(), vocab) - 1,
    }
    if architecture == "mixtral":
        config |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if architecture == "seed_oss":
        config |= {"attention_bias": False, "attention_out_bias": False, "mlp_bias": False}
    if architecture == "olmoe":
        config |= {"num_experts": 4, "num_experts_per_tok": 2}
    if architecture.startswith("gemma3"):
        config |= {"query_pre_attn_scalar": hidden // 2, "sliding_window_pattern": 2}
        config |= {"sliding_window": 8}
    return config | _further_fields(architecture, hidden)


def _further_fields(architecture: str, hidden: int) -> dict[str, Any]:
    if architecture == "qwen3_moe":
        return {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": hidden,
            "norm_topk_prob": True,
        }
    if architecture == "gpt_oss":
        return {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "layer_types": ["sliding_attention", "full_attention"],
        }
    if architecture == "mamba2":
        return {
            "num_heads": 4,
            "head_dim": hidden // 2,
            "intermediate_size": 2 * hidden,
            "state_size": 16,
            "layer_norm_epsilon": 1e-5,
            "conv_kernel": 4,
            "n_groups": 1,
            "use_bias": False,
            "use_conv_bias": True,
            "time_step_limit": [0.0, 100.0],
            "time_step_rank": "auto",
        }
    if architecture == "lfm2":
        return {
            "norm_eps": 1e-5,
            "conv_bias": False,
            "conv_L_cache": 3,
            "block_dim": hidden,
            "block_multiple_of": 16,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["conv", "full_attention"],
        }
    if architecture == "qwen3_next":
        return {
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_conv_kernel_dim": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "shared_expert_intermediate_size": hidden,
            "mlp_only_layers": [],
            "moe_intermediate_size": hidden,
            "partial_rotary_factor": 0.5,
            "full_attention_interval": 2,
        }
    return {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
