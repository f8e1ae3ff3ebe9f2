"""Rotary position embeddings in `config.json`: every spelling, and every value that is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from mlops.checkpoints.language_settings import LanguageModel
from mlops.checkpoints.rope import EVERY_LAYER, Rope, frequencies, read_ropes
from mlops.checkpoints.rope_settings import RopeSettings, translate_ropes
from mlops.checkpoints.translation import refuse_otherwise
from mlops.errors import PackagingError

HERE = Path("model")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}


def read(**settings: Any) -> dict[str, Rope | None]:
    return read_ropes(HERE, LLAMA | settings)[0]


def translated(**settings: Any) -> RopeSettings:
    model = LanguageModel.of(LLAMA | settings)
    return translate_ropes(HERE, model, model.settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {}),
        ({"rope_theta": 5e5}, Rope(5e5)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, Rope(5e5)),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}, Rope(5e5)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": 1e4},
         Rope(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
         Rope(5e5, "linear", settings={"factor": 2.0})),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
         Rope(5e5, settings={"mrope_section": [2, 3, 3]})),
        ({"rope_theta": 5e5, "partial_rotary_factor": 0.25}, Rope(5e5, partial=0.25)),
        ({"model_type": "gpt_neox", "rotary_emb_base": 5e5, "rotary_pct": 0.5},
         Rope(5e5, partial=0.5)),
        ({"model_type": "phi", "rope_theta": 5e5}, Rope(5e5, partial=0.5)),
    ],
)  # fmt: skip
def test_all_spellings_say_the_same(settings: dict[str, Any], expected: Any) -> None:
    assert read(**settings) == ({EVERY_LAYER: expected} if expected else {})


def test_layers_of_gemma_3_differ_in_both_spellings() -> None:
    new = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    old = {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    expected = {
        "sliding_attention": Rope(1e4),
        "full_attention": Rope(1e6, "linear", settings={"factor": 8.0}),
    }
    assert read(model_type="gemma3_text", rope_parameters=new) == expected
    assert read(model_type="gemma3_text", **old) == expected


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_theta": 0}, "rope_theta in config.json is '0', not a positive number"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": "1e6"}, "rope_theta"),
        ({"rope_theta": True}, "rope_theta"),
        ({"rope_theta": math.nan}, "rope_theta"),
        ({"rope_theta": math.inf}, "rope_theta"),
        ({"rope_theta": {"__float__": "Infinity"}}, "rope_theta"),
        ({"rope_theta": 1e5, "rope_type": 3}, "rope_type"),
        ({"rope_theta": 1e5, "rope_type": "spiral"}, "the rope_type 'spiral' .* is unknown"),
        ({"rope_theta": 1e5, "partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"rope_theta": 1e5, "partial_rotary_factor": 0}, "partial_rotary_factor"),
        (YARN | {"factor": 0}, "factor"),
        (YARN | {"factor": "4"}, "factor"),
        (YARN | {"factor": None, "original_max_position_embeddings": "8"}, "original_max"),
        (YARN | {"original_max_position_embeddings": 10**400}, "original_max"),
        (YARN | {"rope_theta": 0.5}, "rope_theta"),
        (YARN | {"beta_fast": -1}, "beta_fast"),
        (YARN | {"mscale": "1"}, "mscale"),
        (YARN | {"attention_factor": math.nan}, "attention_factor"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "high_freq_factor"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 4},
         "more than low_freq_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 8}, "long_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 7, "long_factor": [1.0] * 8},
         "7 numbers in short_factor, but 8 pairs"),
        ({"rope_type": "longrope", "short_factor": [0.0] * 8, "long_factor": [1.0] * 8},
         "short_factor"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_refused(
    settings: dict[str, Any], message: str, spelling: str
) -> None:
    with pytest.raises(PackagingError, match=message):
        translated(**{spelling: settings})


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_anything_but_an_object_is_refused(name: str) -> None:
    with pytest.raises(PackagingError, match=f"{name} in config.json is .*, not an object"):
        translated(**{name: ["yarn"]})


def test_settings_of_a_type_of_layer_are_an_object() -> None:
    with pytest.raises(PackagingError, match="rope_parameters.full_attention .* not an object"):
        translated(rope_parameters={"full_attention": "yarn"})


def test_who_wins_is_said() -> None:
    both = translated(rope_theta=1e4, rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    assert both.model_config["rope_theta"] == 5e5
    assert "rope_theta is '10000.0', and within rope_parameters" in both.warnings[0]
    objects = translated(
        rope_theta=1e4,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
        rope_parameters={"rope_theta": 5e5, "rope_type": "default"},
    )
    assert objects.ropes == (Rope(1e4, "linear", settings={"factor": 2.0}),)
    assert any("'rope_theta' is '500000.0': it is '10000.0'" in text for text in objects.warnings)
    assert not translated(rope_theta=1e4, rope_parameters={"rope_theta": 1e4}).warnings


def test_names_are_those_that_the_class_reads() -> None:
    new = {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}}
    assert translated(**new, model_type="phi").model_config == {
        "rope_theta": 5e5, "partial_rotary_factor": 0.5
    }  # fmt: skip
    assert translated(**new, model_type="gpt_neox").model_config == {
        "rotary_emb_base": 5e5, "rotary_pct": 0.5
    }  # fmt: skip
    assert translated(rope_theta=5e5).model_config == {"rope_scaling": None}


def test_the_context_ends_where_longrope_has_other_factors() -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    long = {"rope_type": "longrope", "original_max_position_embeddings": 4096} | factors
    capped = translated(rope_scaling=long)
    assert capped.max_context_tokens == 4096
    assert "up to 4096 tokens are served, not 8192" in capped.warnings[0]
    same = translated(rope_scaling=long | {"short_factor": [2.0] * 8})
    assert same.max_context_tokens is None
    assert not same.warnings


def test_dynamic_changes_nothing_in_the_context_and_says_so() -> None:
    dynamic = translated(rope_theta=1e4, rope_scaling={"type": "dynamic", "factor": 2.0})
    assert dynamic.ropes == ()
    assert dynamic.model_config["rope_scaling"] is None
    assert "max_position_embeddings (8192)" in dynamic.warnings[0]


def test_a_class_without_a_rope_to_replace_refuses_what_it_does_not_compute() -> None:
    with pytest.raises(PackagingError, match="rope_type yarn, which mlx-lm does not compute for"):
        translated(model_type="nanochat", rope_parameters=YARN)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "minimax", "attn_type_list": [0, 1]}, "minimax is for MiniMax M2"),
        ({"model_type": "minimax", "layer_types": ["linear_attention"]}, "is for MiniMax M2"),
        ({"model_type": "bailing_hybrid", "linear_num_heads": 4}, "for an older model of this"),
        ({"model_type": "phi3small"}, "otherwise in pieces than whole"),
        ({"model_type": "plamo3"}, "otherwise in pieces than whole"),
        ({"model_type": "olmo"}, "needs the library hf_olmo"),
    ],
)
def test_what_mlx_lm_computes_otherwise_is_refused_by_name(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(PackagingError, match=message):
        refuse_otherwise(HERE, LLAMA | settings)


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn", "proportional"])
def test_frequencies_have_half_as_many_as_dimensions(kind: str) -> None:
    settings = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = Rope(1e4, kind, 0.5, settings | {"original_max_position_embeddings": 64})
    wavelengths, _ = frequencies(rope, 16)
    assert len(wavelengths) == 8
    assert wavelengths == sorted(wavelengths)
    assert wavelengths[0] == (4.0 if kind in ("linear", "proportional") else 1.0)
