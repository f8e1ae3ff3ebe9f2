"""The cases of the sweep: settings of tiny models, as keyword arguments of transformers' configs.

To add one, append to `CASES`. Every architecture that mlx-lm and transformers both have is in
`DEFAULTS`, or in `LEFT_OUT` with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
"""What every configuration is given of these, where its class has the setting."""


@dataclass(frozen=True, eq=False)
class Case:
    """One tiny model.

    Attributes:
        architecture: the `model_type`.
        name: what is special about it.
        config: settings that its configuration gets beside `SIZES` and `DEFAULTS`.
    """

    architecture: str
    name: str
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        return DEFAULTS.get(self.architecture, {}) | self.config

    def __str__(self) -> str:
        return f"{self.architecture}-{self.name}"


_LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
"""Multi-head latent attention."""

_GROUPS = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
_SLIDING = {"sliding_window": 32, "num_hidden_layers": 4}
"""Shorter than the prompt; most of these have one full layer in four."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "afmoe": _SLIDING | {"global_attn_every_n_layers": 2, "num_dense_layers": 1},
    "apertus": {},
    "bailing_hybrid": {},
    "bitnet": {},
    "cohere": {},
    "cohere2": _SLIDING,
    "dbrx": {},
    "deepseek_v2": _LATENT | _GROUPS,
    "deepseek_v3": _LATENT | _GROUPS,
    "deepseek_v32": _LATENT
    | _GROUPS
    | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 512},
    "dots1": _GROUPS,
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "exaone4": _SLIDING,
    "exaone_moe": _SLIDING | _GROUPS,
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
    "falcon_mamba": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": _SLIDING | {"sliding_window_pattern": 2},
    "gemma4_text": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": _GROUPS,
    "glm4_moe_lite": _LATENT | _GROUPS,
    "glm_moe_dsa": _LATENT
    | _GROUPS
    | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 512},
    "gpt2": {"num_attention_heads": 4, "n_inner": None},
    "gpt_bigcode": {"n_inner": 128},
    "gpt_neox": {"intermediate_size": 256},
    "gpt_oss": _SLIDING,
    "gptj": {"rotary_dim": 8},
    "granite": {},
    "granitemoe": {},
    "granitemoehybrid": {
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "shared_intermediate_size": 96,
        "position_embedding_type": "rope",
    },
    "helium": {},
    "hunyuan_v1_dense": {},
    "internlm3": {},
    "iquestcoder": {},
    "jamba": {
        "num_experts": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_hidden_layers": 4,
    },
    "kimi_linear": {},
    "laguna": {},
    "lfm2": {"full_attn_idxs": [1], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {
        "num_hidden_layers": 4,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    },
    "llama": {},
    "llama4_text": {},
    "longcat_flash": {},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1},
    "mellum": {},
    "mimo_v2_flash": {},
    "minicpm3": _LATENT | {"tie_word_embeddings": False},
    "minimax": {},
    "minimax_m2": {},
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": _SLIDING,
    "olmo_hybrid": {"num_hidden_layers": 4},
    "olmoe": {},
    "phi": {},
    "phi3": {},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5": {"num_hidden_layers": 4},
    "qwen3_5_moe": {"num_hidden_layers": 4},
    "qwen3_moe": {},
    "qwen3_next": {
        "num_hidden_layers": 4,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "lru_width": 64,
        "attention_window_size": 256,
    },
    "seed_oss": {},
    "smollm3": {"num_hidden_layers": 4},
    "solar_open": _GROUPS,
    "stablelm": {},
    "starcoder2": {},
}
"""What an architecture needs beside `SIZES` to be tiny and to show all its kinds of layer."""

CASES: tuple[Case, ...] = (*(Case(architecture, "default") for architecture in DEFAULTS),)
