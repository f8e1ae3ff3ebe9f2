"""Where translation, windows, rotary embeddings and refusals of one `config.json` meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlops.checkpoints import library_sources
from mlops.checkpoints.checkpoint import CONTEXT_TOKENS
from mlops.checkpoints.language_settings import LanguageModel
from mlops.checkpoints.quantization import mlx_lm_mentions
from mlops.checkpoints.rope import Rope
from mlops.checkpoints.settings import Honoured, honour_settings
from mlops.errors import PackagingError

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 99,
    "tie_word_embeddings": False,
}
LLAMA = SIZES | {"model_type": "llama"}
MISTRAL = SIZES | {"model_type": "mistral"}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 128,
}


def honour(config: dict[str, Any]) -> Honoured:
    return honour_settings(Path("model"), config, ("lm_head.weight",))


def test_a_text_part_is_told_all_that_it_would_be_told_alone() -> None:
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "sliding_window": 64}
    text = {name: value for name, value in MISTRAL.items() if name != "num_key_value_heads"} | new
    alone = honour(text)
    inside = honour({"model_type": "mistral3", "tie_word_embeddings": True, "text_config": text})
    told = dict(inside.model_config["text_config"])
    assert told["rope_theta"] == 5e5
    assert told["num_key_value_heads"] == 8  # transformers' default
    assert told.pop("tie_word_embeddings") is True
    expected = {k: v for k, v in {**text, **alone.model_config}.items() if k != CONTEXT_TOKENS}
    assert told == {k: v for k, v in expected.items() if k != "tie_word_embeddings"}
    assert alone.model_config[CONTEXT_TOKENS] == inside.model_config[CONTEXT_TOKENS] == 64


def test_the_text_part_s_vocabulary_is_told_where_the_whole_has_none() -> None:
    text = SIZES | {"model_type": "gemma3_text", "head_dim": 16}
    assert honour({"model_type": "gemma3", "text_config": text}).model_config["vocab_size"] == 99


def test_a_stray_text_config_takes_nothing_from_a_model_without_parts() -> None:
    rope = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}
    honoured = honour(LLAMA | rope | {"text_config": {}})
    assert honoured.ropes == (Rope(5e5, "linear", settings={"factor": 4.0}),)
    assert "text_config" not in honoured.model_config


def test_settings_of_the_text_part_may_stand_at_the_top_where_mlx_lm_takes_them_there() -> None:
    rope = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    published = SIZES | rope | {"model_type": "qwen2_vl", "vision_config": {"depth": 1}}
    honoured = honour(published)
    assert honoured.warnings == ()
    assert not honoured.ropes
    with pytest.raises(PackagingError, match="does not set text_config"):
        honour(SIZES | {"model_type": "mistral3"})


@pytest.mark.parametrize("window", [64, 256])
def test_of_two_limits_of_the_context_the_shorter_wins(window: int) -> None:
    honoured = honour(MISTRAL | {"rope_parameters": LONGROPE, "sliding_window": window})
    assert honoured.model_config[CONTEXT_TOKENS] == min(window, 128)
    assert [text.split()[0] for text in honoured.warnings] == ["up", "mlx-lm"]


def test_what_is_told_is_not_taken_for_what_the_file_says() -> None:
    """No warning of a name, and no refusal of a value, that the file does not have."""
    honoured = honour(
        SIZES | {"model_type": "qwen3_moe", "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 64, "mlp_only_layers": [], "decoder_sparse_step": 1}
        | {"norm_topk_prob": True, "head_dim": 16}
    )  # fmt: skip
    assert honoured.model_config["num_experts"] == 4
    assert honoured.warnings == ()


def test_a_warning_is_given_once() -> None:
    inside = {"rope_theta": 5e5, "rope_type": "default"}
    honoured = honour(
        MISTRAL | {"rope_parameters": inside, "sliding_window": 64, "residual_gain": 3}
    )
    assert len(honoured.warnings) == len(set(honoured.warnings)) == 3


def test_a_refused_value_is_refused_within_a_text_config_too() -> None:
    change = {"hidden_act": "relu"}
    for config in (LLAMA | change, {"model_type": "llava", "text_config": LLAMA | change}):
        with pytest.raises(PackagingError, match="hidden_act 'relu'"):
            honour(config)


def test_layers_of_gemma_3_as_it_was_published_each_have_their_rotary_embedding() -> None:
    """Its first files say neither which layers see all, nor how many heads there are."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 12,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    honoured = honour({"model_type": "gemma3", "text_config": text})
    full, sliding = Rope(1e6, "linear", settings={"factor": 8.0}), Rope(1e4)
    assert honoured.ropes == ((sliding,) * 5 + (full,)) * 2
    every_third = text | {"sliding_window_pattern": 3, "num_hidden_layers": 3}
    assert honour(every_third).ropes == (sliding, sliding, full)


@pytest.mark.parametrize(
    ("change", "name", "value"),
    [
        ({"model_type": "qwen3"}, "head_dim", 128),
        ({"model_type": "gemma"}, "head_dim", 256),
        ({"model_type": "gemma3_text"}, "sliding_window", 4096),
        ({"model_type": "mamba", "expand": 2, "state_size": 16, "conv_kernel": 4, "use_bias": False,
          "use_conv_bias": True, "time_step_rank": 4, "intermediate_size": None},
         "intermediate_size", 128),
        ({"model_type": "gemma4_text"}, "final_logit_softcapping", None),
    ],
)  # fmt: skip
def test_what_the_file_leaves_out_is_what_transformers_takes(
    change: dict[str, Any], name: str, value: Any
) -> None:
    config = SIZES | {"tie_word_embeddings": True} | change
    assert honour(config).model_config[name] == value


@pytest.mark.parametrize("name", ["attention_in_multiplier", "key_multiplier"])
def test_a_factor_that_is_null_ends_in_no_traceback(name: str) -> None:
    honour(SIZES | {"model_type": "falcon_h1", name: None})


def test_names_of_layers_are_names() -> None:
    with pytest.raises(PackagingError, match="not a list of names"):
        honour(LLAMA | {"layer_types": [["full_attention"], {}]})


def test_one_source_tells_what_mlx_lm_reads() -> None:
    llama = library_sources.of_mlx_lm("llama")
    assert llama.fields["num_hidden_layers"].is_required
    assert {"rope_theta", "rope_scaling"} <= llama.used
    assert llama.has_rope
    assert LanguageModel.of(MISTRAL).mlx_lm is llama
    assert mlx_lm_mentions({"model_type": "kimi_k25"}, "kv_b_proj")  # deepseek_v3's
    assert not mlx_lm_mentions({"model_type": "llama"}, "kv_b_proj")
    assert not mlx_lm_mentions({"model_type": "no_such"}, "weight")
