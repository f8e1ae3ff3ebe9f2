"""Configurations of released models, as their files are: read whole, and without needless words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlops.checkpoints.checkpoint import CONTEXT_TOKENS
from mlops.checkpoints.rope import Rope
from mlops.checkpoints.settings import Honoured, honour_settings

HERE = Path("model")
_COMMON = {
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 32768,
    "num_attention_heads": 16,
    "num_hidden_layers": 4,
    "num_key_value_heads": 8,
    "rope_theta": 1e6,
    "vocab_size": 32000,
}
GEMMA3 = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 12,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}
QWEN2_VL = _COMMON | {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "image_token_id": 151655,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536},
}
HUNYUAN = _COMMON | {
    "model_type": "hunyuan_v1_dense",
    "cla_share_factor": 2,
    "dense_list": [2048, 0],
    "eod_token_id": 120020,
    "head_dim": 128,
    "im_end_id": 6,
    "org_vocab_size": 32000,
    "pad_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
    "use_cla": False,
    "use_qk_norm": True,
}
LFM2 = _COMMON | {
    "model_type": "lfm2",
    "block_auto_adjust_ff_dim": True,
    "block_dim": 2048,
    "block_ff_dim": 8192,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 256,
    "block_norm_eps": 1e-05,
    "conv_L_cache": 3,
    "conv_bias": False,
    "conv_dim": 2048,
    "conv_dim_out": 2048,
    "full_attn_idxs": [1, 3],
    "norm_eps": 1e-05,
}
COHERE2 = _COMMON | {
    "model_type": "cohere2",
    "head_dim": 128,
    "layer_norm_eps": 1e-05,
    "layer_switch": 4,
    "logit_scale": 0.25,
    "order_of_interleaved_layers": "local_attn_first",
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
}
STARCODER2 = _COMMON | {
    "model_type": "starcoder2",
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_epsilon": 1e-05,
    "norm_epsilon": 1e-05,
    "norm_type": "layer_norm",
    "sliding_window": None,
    "use_bias": True,
}
MAMBA = {
    "model_type": "mamba",
    "conv_kernel": 4,
    "d_model": 768,
    "expand": 2,
    "hidden_size": 768,
    "intermediate_size": 1536,
    "layer_norm_epsilon": 1e-05,
    "n_layer": 24,
    "num_hidden_layers": 24,
    "pad_vocab_size_multiple": 8,
    "state_size": 16,
    "time_step_rank": 48,
    "use_bias": False,
    "use_conv_bias": True,
    "vocab_size": 50280,
}
PUBLISHED = {
    "gemma 3 4b": GEMMA3,
    "qwen2-vl": QWEN2_VL,
    "qwen2.5-vl": QWEN2_VL | {"model_type": "qwen2_5_vl"},
    "hunyuan": HUNYUAN,
    "lfm2": LFM2,
    "cohere2": COHERE2,
    "starcoder2": STARCODER2,
    "mamba": MAMBA,
}


def read(config: dict[str, Any]) -> Honoured:
    honoured = honour_settings(HERE, config, ["lm_head.weight"])
    assert CONTEXT_TOKENS not in honoured.model_config
    return honoured


@pytest.mark.parametrize("name", sorted({*PUBLISHED} - {"hunyuan"}))
def test_released_models_need_no_word(name: str) -> None:
    assert read(PUBLISHED[name]).warnings == ()


def test_hunyuan_has_settings_that_nothing_reads() -> None:
    assert read(HUNYUAN).warnings == ()
    assert "sets cla_gain" in read(HUNYUAN | {"cla_gain": 2}).warnings[0]


def test_the_layers_of_gemma_3_follow_from_its_pattern_where_the_file_has_no_types() -> None:
    sliding, full = Rope(1e4), Rope(1e6, "linear", settings={"factor": 8.0})
    assert read(GEMMA3).ropes == (*[sliding] * 5, full, *[sliding] * 5, full)
    text = GEMMA3["text_config"] | {"sliding_window_pattern": 3}  # type: ignore[operator]
    assert read(GEMMA3 | {"text_config": text}).ropes == (sliding, sliding, full) * 4


def test_an_epsilon_that_is_computed_with_counts_by_any_name() -> None:
    changed = read(STARCODER2 | {"layer_norm_epsilon": 1e-3})
    assert "sets layer_norm_epsilon" in changed.warnings[0]
