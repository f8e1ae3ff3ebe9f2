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
    "intermediate_size": 128,
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
    "moe_intermediate_size": 64,
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
        """With what its architecture needs; of a model that also sees, those of its text part."""
        settings = DEFAULTS.get(self.architecture) or _REFUSED_SIZES.get(self.architecture, {})
        if "text_config" not in settings:
            return settings | self.config
        return settings | {"text_config": settings["text_config"] | self.config}

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
_IN_GROUPS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 8),
    "n_group": 4,
    "topk_group": 2,
}
_SLIDING = {"sliding_window": 32, "num_hidden_layers": 4}
"""Shorter than the prompt; most of these have one full layer in four."""

_GATED_DELTA = {
    "num_hidden_layers": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 64,
}
_GEMMA_4 = _SLIDING | {
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 259,
    "num_kv_shared_layers": 0,
}
_QWEN_VISION = {"depth": 1, "num_heads": 2, "out_hidden_size": 64}
_KIMI = _LATENT | {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "q_lora_rank": None,
}
_LLAMA_4 = {"intermediate_size_mlp": 128, "num_hidden_layers": 4, "num_experts_per_tok": 1}
_MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}

DEFAULTS: dict[str, dict[str, Any]] = {
    "afmoe": _SLIDING | {"global_attn_every_n_layers": 2, "num_dense_layers": 1},
    "apertus": {},
    "cohere": {},
    "cohere2": _SLIDING,
    "deepseek_v2": _LATENT | _GROUPS,
    "deepseek_v3": _LATENT | _GROUPS,
    "deepseek_v32": _LATENT
    | _GROUPS
    | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 512},
    "dots1": _GROUPS,
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": _SLIDING,
    "exaone_moe": _SLIDING | _GROUPS,
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
    "falcon_mamba": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": _SLIDING | {"sliding_window_pattern": 2},
    "gemma4_text": _GEMMA_4,
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
    "gpt_oss": {"sliding_window": 32},
    "gptj": {"rotary_dim": 8},
    "granite": {},
    "granitemoe": {},
    "granitemoehybrid": {
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "shared_intermediate_size": 128,
        "position_embedding_type": "rope",
    },
    "helium": {},
    "hunyuan_v1_dense": {},
    "internlm3": {},
    "iquestcoder": {},
    "jamba": {
        "num_local_experts": 1,
        "num_experts": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_hidden_layers": 4,
    },
    "kimi_linear": _KIMI,
    "laguna": {},
    "lfm2": {"full_attn_idxs": [1], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {
        "num_hidden_layers": 4,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    },
    "llama": {},
    "llama4_text": _LLAMA_4,
    "longcat_flash": _LATENT | {"zero_expert_num": 2, "num_layers": 2},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1},
    "mellum": {},
    "mimo_v2_flash": {
        "num_hidden_layers": 4,
        "head_dim": 24,
        "v_head_dim": 16,
        "sliding_window": 33,
        "layer_types": ["full_attention", *["sliding_attention"] * 2, "full_attention"],
    },
    "minicpm3": _LATENT | {"tie_word_embeddings": False},
    "minimax_m2": {},
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {},
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
    "qwen3_5": {"text_config": _GATED_DELTA, "vision_config": _QWEN_VISION},
    "qwen3_5_moe": {"text_config": _GATED_DELTA, "vision_config": _QWEN_VISION},
    "qwen3_moe": {},
    "qwen3_next": _GATED_DELTA,
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "lru_width": 64,
        "attention_window_size": 256,
    },
    "seed_oss": {},
    "smollm3": {"num_hidden_layers": 4},
    "solar_open": {"n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "stablelm": {},
    "starcoder2": {},
    "gemma3": {"text_config": _SLIDING | {"sliding_window_pattern": 2}},
    "gemma4": {"text_config": _GEMMA_4},
    "llama4": {"text_config": _LLAMA_4},
    "llava": {"text_config": {}},
    "mistral3": {"text_config": {}},
    "mistral4": _LATENT | _GROUPS | {"qk_nope_head_dim": 8, "head_dim": 16},
    "qwen2_vl": {
        "text_config": {"rope_parameters": _MROPE},
        "vision_config": {"depth": 1, "num_heads": 2, "embed_dim": 64},
    },
    "qwen2_5_vl": {"text_config": {"rope_parameters": _MROPE}, "vision_config": _QWEN_VISION},
    "qwen3_vl": {
        "text_config": {"rope_parameters": _MROPE},
        "vision_config": _QWEN_VISION | {"deepstack_visual_indexes": [0]},
    },
    "qwen3_vl_moe": {
        "text_config": {"rope_parameters": _MROPE},
        "vision_config": _QWEN_VISION | {"deepstack_visual_indexes": [0]},
    },
    "minimax_m3_vl": {"text_config": {"rotary_dim": 8}},
}
"""What an architecture needs beside `SIZES` to be tiny and to show all its kinds of layer."""

REFUSED = {
    "bailing_hybrid": "mlx-lm's class for bailing_hybrid is for an older model of this name",
    "bitnet": "mlx-lm only computes packed weights of 1.58 bits",
    "minimax": "mlx-lm's class for minimax is for MiniMax M2",
    "olmo": "mlx-lm's class for olmo needs the library hf_olmo",
}
"""Architectures that are refused as transformers saves them, and why, as the error says."""

_REFUSED_SIZES: dict[str, dict[str, Any]] = {"bailing_hybrid": {"n_group": 1, "topk_group": 1}}

LEFT_OUT = {
    "dbrx": "transformers 5.23 cannot build it",
    "gemma3n": "its vision tower needs timm",
    "gemma4_unified": "no tiny form of it has been made",
    "kimi_k25": "text model inside a multimodal one: deepseek_v3",
    "muse_glimmer": "its vision weights have other names in mlx-lm",
    "muse_spark": "its audio tower cannot be made tiny",
    "pixtral": "a vision tower; the models that have one are llava and mistral3",
    "step3p5": "transformers has it under another name",
}
"""Architectures that were not compared, and why."""

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 50_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
}
_ROPES: dict[str, dict[str, Any]] = {
    "theta": {"rope_type": "default", "rope_theta": 50_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 50_000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 50_000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 50_000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "yarn": _YARN,
    "yarn_parts": _YARN
    | {"truncate": False, "attention_factor": 1.7, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn_mscale": _YARN | {"mscale": 1.3, "mscale_all_dim": 0.7},
}
_SCALED = """afmoe apertus cohere cohere2 deepseek_v2 deepseek_v3 dots1 ernie4_5 exaone4 exaone_moe
    falcon_h1 gemma gemma2 glm glm4 glm4_moe glm4_moe_lite gpt_neox granite granitemoe
    granitemoehybrid helium hunyuan_v1_dense internlm3 iquestcoder lfm2 lfm2_moe llama
    minicpm3 minimax_m2 mistral mixtral nemotron olmo2 olmoe phi qwen2 qwen2_moe qwen3 qwen3_moe
    qwen3_next seed_oss smollm3 solar_open stablelm starcoder2""".split()  # noqa: SIM905 - a list of fifty lines is harder to read
"""Whose layers all have the same rotary embedding, of any type."""

_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 50_000.0,
    "short_factor": [1.0 + 0.3 * number for number in range(8)],
    "long_factor": [2.0 + 0.5 * number for number in range(8)],
    "original_max_position_embeddings": 256,
}
_BY_LAYER = {"full_attention": _YARN, "sliding_attention": _ROPES["theta"]}

ROPE_CASES: tuple[Case, ...] = (
    *(
        Case(architecture, kind, {"rope_parameters": _ROPES[kind]})
        for architecture in _SCALED
        for kind in ("theta", "yarn")
    ),
    *(
        Case(architecture, kind, {"rope_parameters": _ROPES[kind]})
        for architecture in ("llama", "qwen3_moe", "phi", "glm4", "gemma")
        for kind in ("linear", "dynamic", "llama3", "yarn_parts", "yarn_mscale")
    ),
    *(
        Case(architecture, "partial", {"rope_parameters": _ROPES["theta"] | partial})
        for architecture in ("glm", "glm4", "gpt_neox", "nemotron", "phi", "stablelm", "qwen3_next")
        for partial in ({"partial_rotary_factor": 0.75},)
    ),
    *(
        Case(architecture, "yarn_mscale", {"rope_parameters": _ROPES["yarn_mscale"]})
        for architecture in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")
    ),
    *(
        Case(architecture, "by_layer", {"rope_parameters": _BY_LAYER})
        for architecture in ("gemma3_text", "gemma3", "olmo3")
    ),
    Case(
        "laguna",
        "by_layer",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 32,
            "rope_parameters": {
                "full_attention": _YARN | {"partial_rotary_factor": 0.5},
                "sliding_attention": _ROPES["theta"],
            },
        },
    ),
    Case(
        "mellum",
        "by_layer",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 32,
            "rope_parameters": _BY_LAYER,
        },
    ),
    Case(
        "phi3",
        "longrope",
        {
            "original_max_position_embeddings": 256,
            "rope_parameters": _LONGROPE,
        },
    ),
    Case(
        "exaone4",
        "no_window",
        {
            "sliding_window": None,
            "layer_types": ["full_attention"] * 4,
            "rope_parameters": _ROPES["theta"],
        },
    ),
    Case("llama", "longrope", {"rope_parameters": _LONGROPE}),
    Case(
        "phimoe",
        "longrope",
        {
            "original_max_position_embeddings": 256,
            "rope_parameters": _LONGROPE | {"short_mscale": 1.2, "long_mscale": 1.4},
        },
    ),
    Case(
        "hunyuan_v1_dense",
        "alpha",
        {"rope_parameters": _ROPES["dynamic"] | {"alpha": 50.0, "type": "dynamic"}},
    ),
)
"""Rotary embeddings other than the default."""

_GROUPED = """deepseek_v3 deepseek_v32 dots1 exaone_moe glm4_moe glm4_moe_lite
    glm_moe_dsa kimi_linear mimo_v2_flash mistral4 nemotron_h solar_open""".split()  # noqa: SIM905

EXPERT_CASES: tuple[Case, ...] = (
    *(Case(architecture, "in_groups", _IN_GROUPS) for architecture in _GROUPED),
    Case("deepseek_v2", "in_groups", _IN_GROUPS | {"topk_method": "group_limited_greedy"}),
    Case("deepseek_v3", "in_all_groups", _IN_GROUPS | {"topk_group": 4}),
    Case("jamba", "experts", {"num_experts": 4, "num_local_experts": 4}),
    Case("llama4_text", "dense", {"moe_layers": []}),
    Case("ernie4_5_moe", "no_shared", {"moe_num_shared_experts": 0}),
)
"""Experts in groups, and other ways to choose and weigh them than the default. The biases that
choose them are all negative (`torch_reference.randomise`), which changes nothing for torch."""

CASES: tuple[Case, ...] = (
    *(Case(architecture, "default") for architecture in DEFAULTS),
    *ROPE_CASES,
    *EXPERT_CASES,
    Case("minicpm3", "tied", {"tie_word_embeddings": True, "dim_model_base": 32}),
)
