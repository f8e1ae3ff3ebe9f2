"""Settings of `config.json` that mlx-lm ignores: told, capped or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops.checkpoints.checkpoint import CONTEXT_TOKENS
from mlops.checkpoints.settings import Honoured, honour_settings
from mlops.errors import PackagingError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "use_cache": True,
    "vocab_size": 128256,
}
_COMMON = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 4,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
MISTRAL = _COMMON | {"model_type": "mistral", "hidden_act": "silu", "sliding_window": 4096}
QWEN2 = _COMMON | {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "max_window_layers": 28,
    "sliding_window": 131072,
    "use_mrope": False,
    "use_sliding_window": False,
}
PHI3 = _COMMON | {
    "model_type": "phi3",
    "hidden_act": "silu",
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "original_max_position_embeddings": 4096,
    "sliding_window": 262144,
}
GEMMA3 = {
    "model_type": "gemma3",
    "boi_token_index": 255999,
    "mm_tokens_per_image": 256,
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}
GRANITE = _COMMON | {
    "model_type": "granite",
    "hidden_act": "silu",
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
    "attention_bias": False,
    "mlp_bias": False,
}
SMOLLM2 = LLAMA | {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {}}
MIXTRAL = _COMMON | {
    "model_type": "mixtral",
    "hidden_act": "silu",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
}
OLMO2 = _COMMON | {"model_type": "olmo2", "hidden_act": "silu", "attention_bias": False}
KIMI_LINEAR = _COMMON | {
    "model_type": "kimi_linear",
    "hidden_act": "silu",
    "first_k_dense_replace": 1,
    "head_dim": 72,
    "kv_lora_rank": 512,
    "linear_attn_config": {
        "full_attn_layers": [4],
        "head_dim": 128,
        "kda_layers": [1, 2, 3],
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "model_max_length": 1048576,
    "moe_intermediate_size": 1024,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_expert_group": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_scaling": None,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "use_grouped_topk": True,
    "v_head_dim": 128,
}
MIMO_V2_FLASH = _COMMON | {
    "model_type": "mimo_v2_flash",
    "hidden_act": "silu",
    "add_full_attention_sink_bias": False,
    "add_swa_attention_sink_bias": True,
    "attention_value_scale": 0.707,
    "head_dim": 192,
    "hybrid_layer_pattern": [0, 1, 1, 1],
    "layernorm_epsilon": 1e-05,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": [0, 1, 1, 1],
    "n_group": 1,
    "n_routed_experts": 256,
    "n_shared_experts": None,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "partial_rotary_factor": 0.334,
    "routed_scaling_factor": None,
    "scoring_func": "sigmoid",
    "sliding_window": 128,
    "sliding_window_size": 128,
    "swa_head_dim": 192,
    "swa_num_attention_heads": 64,
    "swa_num_key_value_heads": 8,
    "swa_rope_theta": 10000,
    "swa_v_head_dim": 128,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
}
PUBLISHED = {
    "llama 3.2": LLAMA,
    "mistral 0.3": MISTRAL | {"sliding_window": None},
    "qwen 2.5": QWEN2,
    "qwen 3": QWEN2 | {"model_type": "qwen3", "head_dim": 128, "attention_bias": False},
    "phi 4 mini": PHI3,
    "gemma 3": GEMMA3,
    "granite 3": GRANITE,
    "smollm2": SMOLLM2,
    "mixtral": MIXTRAL,
    "olmo 2": OLMO2,
    "kimi linear": KIMI_LINEAR,
    "mimo v2 flash": MIMO_V2_FLASH,
}


def honour(config: dict[str, Any], tensors: tuple[str, ...] = ("lm_head.weight",)) -> Honoured:
    return honour_settings(Path("model"), config, tensors)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_need_no_word(name: str) -> None:
    honoured = honour(PUBLISHED[name])
    assert honoured.warnings == ()
    assert CONTEXT_TOKENS not in honoured.model_config


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (LLAMA | {"hidden_act": "relu"}, "hidden_act 'relu'"),
        (_COMMON | {"model_type": "phi", "qk_layernorm": True}, "qk_layernorm is True"),
        (QWEN2 | {"model_type": "qwen3", "attention_bias": True}, "attention_bias is True"),
        (MISTRAL | {"model_type": "olmoe", "clip_qkv": 8.0} | {"num_experts": 8}, "clip_qkv is 8"),
        (
            {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128}
            | {"layer_norm_epsilon": 1e-5, "vocab_size": 99, "scale_attn_weights": False},
            "scale_attn_weights is False",
        ),
        (GEMMA3 | {"text_config": GEMMA3["text_config"] | {"use_bidirectional_attention": True}},
         "use_bidirectional_attention is True"),
        (MIMO_V2_FLASH | {"num_experts_per_tok": 1}, "num_experts_per_tok is 1"),
    ],
)  # fmt: skip
def test_a_value_that_is_not_computed_is_refused_by_name(
    config: dict[str, Any], named: str
) -> None:
    with pytest.raises(PackagingError, match=named):
        honour(config)


def test_a_window_that_mlx_lm_does_not_have_limits_the_context() -> None:
    honoured = honour(MISTRAL)
    assert honoured.model_config[CONTEXT_TOKENS] == 4096
    assert "sliding_window is 4096" in honoured.warnings[0]


def test_a_window_as_long_as_the_context_limits_nothing() -> None:
    assert honour(MISTRAL | {"sliding_window": 32768}).warnings == ()


def test_a_window_is_told_as_mlx_lm_counts_it() -> None:
    """transformers: so many tokens and the one that asks; as it saves it, that one is counted."""
    assert honour(MIMO_V2_FLASH).model_config["sliding_window_size"] == 129
    saved = {k: v for k, v in MIMO_V2_FLASH.items() if k != "sliding_window_size"}
    assert honour(saved).model_config["sliding_window_size"] == 128


def test_layers_with_a_window_only_are_held_to_it() -> None:
    types = ["sliding_attention"] * 4
    told = honour(MISTRAL | {"layer_types": types}).model_config
    assert told["layer_types"] == ["full_attention"] * 4
    assert told[CONTEXT_TOKENS] == 4096


def test_the_order_of_windows_is_told_by_the_name_that_mlx_lm_reads() -> None:
    text = GEMMA3["text_config"] | {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    told = honour(GEMMA3 | {"text_config": text}).model_config["text_config"]
    assert told["sliding_window_pattern"] == 1


@pytest.mark.parametrize("kind", ["gemma3_text", "cohere2"])
def test_an_order_of_windows_that_mlx_lm_does_not_compute_is_refused(kind: str) -> None:
    sliding, full = "sliding_attention", "full_attention"
    sizes = {"num_hidden_layers": 3, "sliding_window": 8, "tie_word_embeddings": True}
    config = _COMMON | sizes | {"model_type": kind}
    regular = honour(config | {"layer_types": [sliding, full, sliding]}).model_config
    assert regular["sliding_window_pattern"] == 2
    for layers in ([sliding, sliding, sliding], [sliding, full, full], [full, sliding, full]):
        with pytest.raises(PackagingError, match="the order of layers"):
            honour(config | {"layer_types": layers})


def test_defaults_of_transformers_are_told_where_mlx_lm_has_others() -> None:
    config = {name: value for name, value in LLAMA.items() if name != "tie_word_embeddings"}
    assert honour(config).model_config["tie_word_embeddings"] is False
    assert "tie_word_embeddings" not in honour(config, ()).model_config


def test_a_setting_that_nobody_knows_is_named_in_a_warning() -> None:
    assert "config.json sets residual_gain" in honour(LLAMA | {"residual_gain": 0.3}).warnings[0]


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": -1e-5},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": 1e9},
        {"rms_norm_eps": "1e-5"},
        {"num_key_value_heads": 5},
        {"num_key_value_heads": 0},
        {"head_dim": -64},
        {"head_dim": "4"},
        {"tie_word_embeddings": "yes"},
        {"layer_types": ["full_attention"]},
        {"sliding_window": -1},
        {"sliding_window": 0},
        {"sliding_window": "4096"},
        {"max_position_embeddings": -1},
        {"max_position_embeddings": 1e6},
        {"max_position_embeddings": "long"},
        {"max_position_embeddings": 10**30},
        {"num_hidden_layers": 10**400},
    ],
    ids=str,
)
def test_impossible_values_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PackagingError, match=next(iter(change))):
        honour(MISTRAL | change)


def test_more_experts_than_there_are_cannot_be_chosen() -> None:
    with pytest.raises(PackagingError, match="num_experts_per_tok is 9"):
        honour(MIXTRAL | {"num_experts_per_tok": 9})


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.just(10**400),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.one_of(st.none(), st.text(max_size=5), st.integers()), max_size=20),
    st.dictionaries(st.text(max_size=8), st.integers(), max_size=3),
)


_LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
FUZZED = PUBLISHED | {
    "phi 3 long": PHI3 | {"rope_scaling": _LONGROPE},
    "llama with windows": LLAMA | {"layer_types": ["sliding_attention"] * 16, "sliding_window": 8},
    "falcon h1": _COMMON | {"model_type": "falcon_h1", "key_multiplier": 0.5},
}


@given(st.sampled_from(sorted(FUZZED)), st.data())
def test_any_value_is_refused_or_taken(name: str, data: st.DataObject) -> None:
    config = json.loads(json.dumps(FUZZED[name]))
    level = config.get("text_config", config)
    for key in data.draw(st.lists(st.sampled_from(sorted(level)), min_size=1, max_size=4)):
        level[key] = data.draw(VALUES)
    if not isinstance(config["model_type"], str):
        return
    try:
        honour(config)
    except PackagingError as exc:
        assert "config.json" in str(exc)
