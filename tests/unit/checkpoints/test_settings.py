"""Settings of `config.json` that mlx-lm ignores: told, capped or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops.checkpoints.settings import CONTEXT_TOKENS, Honoured, honour_settings
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


def test_a_shorter_limit_that_is_known_already_stays() -> None:
    assert honour(MISTRAL | {CONTEXT_TOKENS: 1000}).model_config[CONTEXT_TOKENS] == 1000


def test_layers_with_a_window_only_are_held_to_it() -> None:
    types = ["sliding_attention"] * 4
    told = honour(MISTRAL | {"layer_types": types}).model_config
    assert told == {"layer_types": ["full_attention"] * 4, CONTEXT_TOKENS: 4096}


def test_the_order_of_windows_is_told_by_the_name_that_mlx_lm_reads() -> None:
    text = GEMMA3["text_config"] | {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    told = honour(GEMMA3 | {"text_config": text}).model_config["text_config"]
    assert told["sliding_window_pattern"] == 1
    text["layer_types"] = ["full_attention", "sliding_attention"] * 2
    with pytest.raises(PackagingError, match="the order of layers"):
        honour(GEMMA3 | {"text_config": text})


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
    st.floats(),
    st.text(max_size=20),
    st.lists(st.one_of(st.none(), st.text(max_size=5), st.integers()), max_size=20),
    st.dictionaries(st.text(max_size=8), st.integers(), max_size=3),
)


@given(st.sampled_from(sorted(PUBLISHED)), st.data())
def test_any_value_is_refused_or_taken(name: str, data: st.DataObject) -> None:
    config = json.loads(json.dumps(PUBLISHED[name]))
    level = config.get("text_config", config)
    for key in data.draw(st.lists(st.sampled_from(sorted(level)), min_size=1, max_size=4)):
        level[key] = data.draw(VALUES)
    if not isinstance(config["model_type"], str):
        return
    try:
        honour(config)
    except PackagingError as exc:
        assert "config.json" in str(exc)
