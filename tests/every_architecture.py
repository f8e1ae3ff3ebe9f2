"""A tiny random model of every architecture that the installed mlx-lm has, float32, in memory.

Settings are found by the names of the fields of an architecture's `ModelArgs`; an architecture that
needs other values than the common ones has them in `OWN`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import pkgutil
from typing import Any

from mlops.hardware.open_files import open_file_limit_kept

VOCABULARY = 64
WINDOW = 8

COMMON: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "model_dim", "block_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "swa_v_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "q_lora_rank", "kv_lora_rank"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "moe_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "intermediate_size_mlp", "hidden_dim"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("ff_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "n_inner"), 32),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "model_max_length"), 512),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "num_shared_expert"), 1),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "moe_num_experts"), 1),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"), 1e-5),
    **dict.fromkeys(("layernorm_epsilon",), 1e-5),
    **dict.fromkeys(("rope_theta", "swa_rope_theta", "rotary_emb_base"), 10000.0),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size"), WINDOW),
    **dict.fromkeys(("conv_kernel", "linear_conv_kernel_dim", "mamba_d_conv", "conv1d_width"), 4),
    **dict.fromkeys(("conv_window", "short_conv_kernel_size"), 4),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 32),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 16),
    **dict.fromkeys(("swa_num_attention_heads", "mamba_num_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("swa_num_key_value_heads",), 2),
    **dict.fromkeys(("logits_scaling", "attention_multiplier", "embedding_multiplier"), 1.0),
    **dict.fromkeys(("residual_multiplier", "routed_scaling_factor", "scale_emb"), 1.0),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), 0.5),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias"), False),
    **dict.fromkeys(("use_conv_bias", "norm_topk_prob", "tie_word_embeddings"), True),
    **dict.fromkeys(("conv_bias", "use_expert_bias", "post_norm", "use_qk_norm", "qk_norm"), True),
    **dict.fromkeys(("use_qkv_bias",), True),
    **{key: [] for key in ("mlp_only_layers", "no_rope_layers")},
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "decoder_sparse_step"), 1),
    "mamba_head_dim": 8,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "hidden_act": "silu",
    "dim_model_base": 32,
    "scale_depth": 1.4,
    "rotary_dim": 4,
    "query_pre_attn_scalar": 8,
    "sliding_window_pattern": 2,
    "index_topk": 16,
    "floor_scale": 16,
}
"""By the name of a field, in whatever architecture it is."""

ALTERNATING = ["sliding_attention", "full_attention"] * 2
YARN = {
    "type": "yarn",
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "llama_4_scaling_beta": 0.1,
}
LINEAR_ATTENTION = {
    **{"num_heads": 2, "head_dim": 32, "short_conv_kernel_size": 4},
    **{"kda_layers": [1, 2, 3], "full_attn_layers": [4]},
}
FULL_BLOCK = {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}}
GEMMA3N = {
    **{"num_kv_shared_layers": 0, "rope_local_base_freq": 10000.0, "final_logit_softcapping": 30.0},
    **{"layer_types": ALTERNATING, "activation_sparsity_pattern": [0.0] * 4},
    **{"hidden_size_per_layer_input": 8, "altup_num_inputs": 2, "altup_coef_clip": 120.0},
    **{"altup_correct_scale": True, "altup_active_idx": 0, "laurel_rank": 4},
}

OWN: dict[str, dict[str, Any]] = {
    "afm7": {"num_kv_reuse_layers": 1},
    "afmoe": {"layer_types": ALTERNATING},
    "baichuan_m1": {
        **{"sliding_window_layers": [0, 2], "conv_window": 2, "tie_word_embeddings": False},
    },
    "bailing_hybrid": {"layer_group_size": 2, "group_norm_size": 2},
    "bailing_moe_linear": {"layer_group_size": 2, "group_norm_size": 2},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": YARN, "num_key_value_heads": 4},
    "exaone4": {"rope_scaling": None, "sliding_window_pattern": "LG"},
    "exaone_moe": {"layer_types": ALTERNATING, "is_moe_layer": [False, True, True, True]},
    "falcon_h1": {"mamba_d_head": 8, "mamba_d_ssm": 32},
    "gear": {"layer_types": ["conv_mixer", *ALTERNATING[:3]]},
    "gemma3n": GEMMA3N,
    "gemma4": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8},
    "gemma4_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8},
    "glm4_moe": {"rope_scaling": None},
    "glm_moe_dsa": {
        **{"index_head_dim": 16, "index_n_heads": 2, "index_topk": 16, "moe_layer_freq": 1},
        **{"rope_parameters": YARN, "num_key_value_heads": 4},
    },
    "granitemoehybrid": {
        **{"layer_types": ["mamba", "attention"] * 2, "mamba_d_head": 8, "mamba_n_groups": 1},
        "mamba_conv_bias": True,
    },
    "hunyuan": {
        "rope_scaling": {"factor": 1.0, "type": "dynamic", "alpha": 2.0},
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
    },
    "jamba": {
        **{"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_expand": 2},
        **{"expert_layer_offset": 1, "expert_layer_period": 2},
    },
    "kimi_k3": {
        "num_experts_per_token": 2,
        "hidden_act": "situ",
        "linear_attn_config": LINEAR_ATTENTION,
    },
    "kimi_linear": {"linear_attn_config": LINEAR_ATTENTION, "num_key_value_heads": 4},
    "lille-130m": {"block_size": 512, "n_embd": 256},
    "llama4": {
        **{"attention_chunk_size": WINDOW, "interleave_moe_layer_step": 2, "rope_scaling": None},
        "num_experts_per_tok": 1,
    },
    "llama4_text": {"no_rope_layers": [1, 0, 1, 0]},
    "longcat_flash": {"attention_method": "MLA", "zero_expert_type": "identity"},
    "mamba": {"time_step_rank": 4},
    "mamba2": {"time_step_rank": "auto", "time_step_limit": [0.0, 100.0], "num_heads": 8},
    "mellum": {
        "layer_types": ALTERNATING,
        "rope_parameters": {key: {"rope_theta": 10000.0} for key in set(ALTERNATING)},
    },
    "mimo_v2_flash": {
        **{"hybrid_layer_pattern": [1, 0, 1, 0], "moe_layer_freq": [0, 1, 1, 1]},
        **{"add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False},
    },
    "minicpm3": {"rope_scaling": {**YARN, "long_factor": [1.0] * 4, "short_factor": [1.0] * 4}},
    "ministral3": {"rope_parameters": YARN, "layer_types": ALTERNATING},
    "mistral4": {"rope_parameters": YARN, "num_key_value_heads": 4},
    "muse_spark": {
        **{"post_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 10000.0}},
        **{"layer_rope_theta": [10000.0, 0.0] * 2, "layer_types": ALTERNATING},
        **{"final_logit_softcapping": 30.0, "output_multiplier": 1.0, "num_shared_experts": 0},
        "moe_hidden_size": 32,
    },
    "nemotron-nas": {"block_configs": [FULL_BLOCK] * 4},
    "nemotron_h": {"hybrid_override_pattern": list("M*-E")},
    "olmo_hybrid": {"linear_allow_neg_eigval": True},
    "openelm": {
        **{"num_transformer_layers": 2, "ffn_dim_divisor": 8, "num_query_heads": [4, 4]},
        **{"num_kv_heads": [2, 2], "ffn_multipliers": [1.0, 1.0]},
    },
    # Its tokens that are never said are beyond 100,256: it writes there whatever its vocabulary is.
    "phi3small": {"dense_attention_every_n_layers": 2, "gegelu_limit": 20.0, "vocab_size": 100352},
    "plamo": {"n_shared_head": 2},
    "qwen": {"kv_channels": 8, "intermediate_size": 64},
    "recurrent_gemma": {"logits_soft_cap": 30.0, "block_types": ["recurrent", "attention"]},
    "rwkv7": {
        **{"a_low_rank_dim": 4, "v_low_rank_dim": 4, "gate_low_rank_dim": 4},
        "decay_low_rank_dim": 4,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "spark2_5": {
        "hidden_act": "gelu",
        "rope_parameters": {key: {"rope_theta": 10000.0} for key in set(ALTERNATING)},
    },
    "step3p5": {
        "moe_top_k": 2,
        "num_attention_groups": 2,
        "layer_types": ALTERNATING,
        "moe_num_experts": 4,
    },
    "lfm2": {
        **{"layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3},
        **{"block_multiple_of": 16, "block_ffn_dim_multiplier": 1.0},
        "block_auto_adjust_ff_dim": False,
    },
}
OWN["lfm2_moe"] = OWN["lfm2-vl"] = OWN["lfm2"]
OWN["longcat_flash"] |= {"zero_expert_num": 1, "mla_scale_q_lora": True, "mla_scale_kv_lora": True}
OWN["longcat_flash_ngram"] = OWN["longcat_flash"]
"""What an architecture needs besides, or other than in `COMMON`."""


def names() -> list[str]:
    """The modules of mlx-lm that hold an architecture."""
    with open_file_limit_kept():
        import mlx_lm.models as package

    return [one.name for one in pkgutil.iter_modules(package.__path__) if _has_model(one.name)]


def build(name: str, seed: int = 0, **settings: Any) -> Any:
    """The model, with every floating-point parameter random; settings come before others."""
    import mlx.core as mx
    from mlx.utils import tree_map

    module = _module(name)
    wanted = {**COMMON, **OWN.get(name, {}), **settings}
    mx.random.seed(seed)
    model = module.Model(_arguments(module.ModelArgs, name, wanted))

    def shake(array: Any) -> Any:
        is_number = mx.issubdtype(array.dtype, mx.floating)
        # Parameters begin as zeros or ones in many places: then nothing would depend on them.
        return array + 0.1 * mx.random.normal(array.shape) if is_number else array

    model.update(tree_map(shake, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def _arguments(arguments: Any, name: str, wanted: dict[str, Any]) -> Any:
    fields = {field.name for field in dataclasses.fields(arguments)}
    own = {key: value for key, value in wanted.items() if key in fields}
    if "text_config" in fields and "text_config" not in own:
        own["text_config"] = {**wanted, "model_type": name.removesuffix("_vl")}
    return arguments.from_dict({"model_type": name, **own})


def _module(name: str) -> Any:
    with open_file_limit_kept():
        return importlib.import_module(f"mlx_lm.models.{name}")


def _has_model(name: str) -> bool:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            module = _module(name)
    except (ImportError, SystemExit):  # olmo ends the process where its own package is missing
        return False
    return hasattr(module, "Model") and hasattr(module, "ModelArgs")
