"""What mlx-lm is told of settings that have another name in `config.json`, or none.

transformers has renamed settings, moved some into others, and leaves out what is its default. What
mlx-lm's class reads is taken from its source (`library_sources`), so there is one rule for all, and
short tables for what no rule gives. They go by `model_type`, or by mlx-lm's module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlops.checkpoints.language_settings import ROTARY, WINDOWS, LanguageModel, as_number
from mlops.checkpoints.library_sources import UNKNOWN
from mlops.checkpoints.refusal import refusal
from mlops.checkpoints.rope import head_dim

Settings = Mapping[str, Any]
Derive = Callable[[Settings], Any]

_SAME: tuple[tuple[str, ...], ...] = (
    # Experts: Qwen's and Mixtral's names, DeepSeek's, ERNIE's.
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    ("n_shared_experts", "num_shared_experts"),
    ("num_experts_per_tok", "num_experts_per_token"),
    ("n_group", "num_expert_group"),
    ("norm_topk_prob", "moe_renormalize"),
    # Length of the context: GPT-2's names, everybody's, Kimi's.
    ("n_ctx", "n_positions", "max_position_embeddings", "model_max_length"),
    # LFM2's width of a layer.
    ("block_dim", "hidden_size"),
)
"""Names of one setting: where mlx-lm reads one that is not there, another's value is taken."""

_HANDLED_ELSEWHERE = {"model_type", "text_config"} | (WINDOWS - {"sliding_window"})

_CONSTANTS: dict[str, dict[str, Any]] = {
    # No biases; norms before attention, and of queries and keys.
    "apertus": {"mlp_bias": False, "post_norm": False, "qk_norm": True},
    # mlx-lm's class caps logits, and has inputs for each layer, where the file says nothing.
    "gemma4_text": {"final_logit_softcapping": None},
    "gemma4_unified_text": {"final_logit_softcapping": None, "hidden_size_per_layer_input": 0},
    # It chooses experts as DeepSeek-V3 does, in every layer that has them.
    "glm_moe_dsa": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    # It has no rotary embedding, and mlx-lm's class asks for a number of one.
    "kimi_linear": {"rope_theta": 10_000.0},
    # It has one kind of attention, and experts that pass on what they get.
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    # It has no shared expert; it scores as DeepSeek-V3 does, and windows alone have sinks.
    "mimo_v2_flash": {
        "n_shared_experts": None,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
    },
    # It has no shared expert.
    "minimax": {"shared_intermediate_size": 0},
    # Its text configuration has no such setting, unlike qwen3_moe's.
    "qwen3_vl_moe_text": {"norm_topk_prob": True},
    # All of its layers have experts: there is no other feed-forward layer to have a width.
    "solar_open": {"intermediate_size": 0, "first_k_dense_replace": 0},
}
"""What transformers always does, without a setting, and mlx-lm's class wants to be told."""


def _linear_attention(settings: Settings) -> dict[str, Any] | None:
    kinds = settings.get("layer_types")
    if not isinstance(kinds, list):
        return None
    linear = [number for number, kind in enumerate(kinds, 1) if kind == "linear_attention"]
    return {
        "head_dim": settings.get("linear_head_dim"),
        "num_heads": settings.get("linear_num_heads"),
        "short_conv_kernel_size": settings.get("linear_conv_kernel_dim"),
        "kda_layers": linear,
        "full_attn_layers": [n for n in range(1, len(kinds) + 1) if n not in linear],
    }


def _mamba_width(settings: Settings) -> int | None:
    hidden, expand = settings.get("hidden_size"), settings.get("expand", 2)
    return hidden * expand if type(hidden) is type(expand) is int else None


def _sparse_layers(settings: Settings) -> list[bool] | None:
    kinds = settings.get("mlp_layer_types")
    return [kind == "sparse" for kind in kinds] if isinstance(kinds, list) else None


def _is_each(name: str, kind: str) -> Derive:
    """For each layer whether it is of this kind, as 0 and 1."""

    def derive(settings: Settings) -> list[int] | None:
        kinds = settings.get(name)
        return [int(each == kind) for each in kinds] if isinstance(kinds, list) else None

    return derive


def _same_as(name: str) -> Derive:
    return lambda settings: settings.get(name)


def _twice_the_shared_heads(settings: Settings) -> int | None:
    heads = settings.get("num_key_value_heads")
    return 2 * heads if type(heads) is int else None


def _inner_width(settings: Settings) -> int | None:
    width = settings.get("n_embd")
    return 4 * width if type(width) is int else None


_DERIVED: dict[str, dict[str, Derive]] = {
    "exaone_moe": {"is_moe_layer": _sparse_layers},
    "gpt_bigcode": {"n_inner": _inner_width},
    "kimi_linear": {"linear_attn_config": _linear_attention},
    "mamba": {"intermediate_size": _mamba_width},
    # Read by no line of the model.
    "mamba2": {"intermediate_size": _mamba_width},
    # Other names for the kinds of layers, and what layers with a window have to themselves.
    "mimo_v2_flash": {
        "hybrid_layer_pattern": _is_each("layer_types", "sliding_attention"),
        "moe_layer_freq": _is_each("mlp_layer_types", "sparse"),
        "layernorm_epsilon": _same_as("rms_norm_eps"),
        "swa_head_dim": _same_as("head_dim"),
        "swa_v_head_dim": _same_as("v_head_dim"),
        "swa_num_attention_heads": _same_as("num_attention_heads"),
        "swa_num_key_value_heads": _twice_the_shared_heads,
    },
}
"""Settings that mlx-lm's class needs and transformers doesn't write: they follow from others."""


def _layer_types(names: Mapping[str, str]) -> Derive:
    """The types of layers, by the names that mlx-lm has for them."""

    def derive(settings: Settings) -> list[str] | None:
        given = settings.get("layers_block_type") or settings.get("layer_types")
        if isinstance(given, list) and all(isinstance(entry, str) for entry in given):
            return [names.get(entry, entry) for entry in given]
        return None

    return derive


def _of_full_layers(name: str) -> Derive:
    """A setting that full layers have to themselves, of what transformers 5 writes by layer."""

    def derive(settings: Settings) -> Any:
        layers = settings.get("per_layer_config")
        own = list(layers.values()) if isinstance(layers, dict) else []
        return own[0].get(name) if own and all(isinstance(layer, dict) for layer in own) else None

    return derive


def _factor(settings: Settings, name: str) -> float:
    value = settings.get(name, 1.0)
    return float(value) if isinstance(value, int | float) and value > 0 else 1.0


def _queries_and_keys(settings: Settings) -> float:
    keys = math.sqrt(_factor(settings, "key_multiplier"))
    return _factor(settings, "attention_in_multiplier") * keys


def _values(settings: Settings) -> float:
    inside = _factor(settings, "attention_in_multiplier")
    return _factor(settings, "attention_out_multiplier") * inside


def _last_layer(settings: Settings) -> Any:
    """-1, the default of transformers, is the last: in mlx-lm, none."""
    given = settings.get("moe_layer_end_index")
    return (settings.get("num_hidden_layers") or 0) - 1 if given in (None, -1) else given


def _window_with_query(settings: Settings) -> int | None:
    """As mlx-lm counts it: the token that asks is one of those it sees. As released, it is not."""
    size = settings.get("sliding_window_size")
    return size + 1 if type(size) is int else settings.get("sliding_window")


def _time_step_limit(settings: Settings) -> list[float] | None:
    lowest = settings.get("time_step_min")
    return [lowest, float("inf")] if isinstance(lowest, float) else None


_HYBRID = {"linear_attention": "mamba", "full_attention": "attention"}
_RECURRENT = {"linear_attention": "recurrent", "sliding_attention": "attention"}
_OF_FULL_LAYERS: dict[str, Derive] = {
    "global_head_dim": _of_full_layers("head_dim"),
    "num_global_key_value_heads": _of_full_layers("num_key_value_heads"),
}
_OVERRULED: dict[str, dict[str, Derive]] = {
    "ernie4_5_moe": {"moe_layer_end_index": _last_layer},
    # mlx-lm scales queries and keys by attention_in_multiplier, values not, and leaves
    # key_multiplier out.
    "falcon_h1": {
        "attention_in_multiplier": _queries_and_keys,
        "attention_out_multiplier": _values,
    },
    # Full layers have other heads, which transformers 5 writes layer by layer.
    "gemma4_text": _OF_FULL_LAYERS,
    "gemma4_unified_text": _OF_FULL_LAYERS,
    # mlx-lm has other names for the types of layers.
    "granitemoehybrid": {"layer_types": _layer_types(_HYBRID)},
    "jamba": {"layers_block_type": _layer_types(_HYBRID)},
    "recurrent_gemma": {"block_types": _layer_types(_RECURRENT)},
    "mimo_v2_flash": {"sliding_window_size": _window_with_query},
    # transformers only looks at the lower bound.
    "nemotron_h": {"time_step_limit": _time_step_limit},
}
"""Settings that follow from others, whatever the file says of them."""


def _has_linear_attention(config: Settings) -> bool:
    """By the names of transformers, or by those of the released configuration, where 0 stands for
    linear."""
    for name, linear in (("layer_types", "linear_attention"), ("attn_type_list", 0)):
        layers = config.get(name)
        if isinstance(layers, list) and linear in layers:
            return True
    return False


_OTHERWISE: dict[str, tuple[Callable[[Mapping[str, Any]], bool], str]] = {
    "bailing_hybrid": (
        lambda config: "linear_num_heads" in config,
        "is for an older model of this name, with another linear attention",
    ),
    "minimax": (
        _has_linear_attention,
        "is for MiniMax M2; it does not compute the linear attention of MiniMax Text 01",
    ),
    "phi3small": (
        lambda config: True,
        "computes a text otherwise in pieces than whole, and writes past a small vocabulary",
    ),
    "plamo3": (
        lambda config: True,
        "computes a text otherwise in pieces than whole",
    ),
    "olmo": (
        lambda config: True,
        "needs the library hf_olmo, and ends the process without it",
    ),
}
"""Which models mlx-lm's class does not compute as transformers does, and what it does instead."""


def refuse_otherwise(path: Path, settings: Settings) -> None:
    """Raise `PackagingError` for a model that mlx-lm's class computes otherwise."""
    applies, reason = _OTHERWISE.get(str(settings.get("model_type")), (lambda _: False, ""))
    if applies(settings):
        raise refusal(
            f"{path} cannot be served: mlx-lm's class for {settings.get('model_type')} {reason}; "
            "serve it with transformers",
            path,
            architecture=settings.get("model_type"),
        )


def translate(model: LanguageModel, has_output_layer: bool) -> dict[str, Any]:
    """Settings for mlx-lm, which replace those of the same name.

    Rotary embeddings and windows are not among them.

    Args:
        has_output_layer: there are tensors of one.
    """
    settings, fields = model.settings, model.mlx_lm.fields
    model_config: dict[str, Any] = {}
    for name in model.mlx_lm.used & settings.keys():
        if (number := as_number(settings[name])) != settings[name]:
            model_config[name] = number
    for name, derive in model.own(_OVERRULED).items():
        if name in fields and (value := derive(settings)) is not None:
            model_config[name] = value
    for name, value in model.own(_CONSTANTS).items():
        if name in fields and name not in settings:
            model_config[name] = value
    for name in sorted(fields.keys() - model_config.keys() - _HANDLED_ELSEWHERE):
        if settings.get(name) is not None:
            continue
        value = _left_out(model, name, has_output_layer)
        if value is not None and (fields[name].default is UNKNOWN or value != fields[name].default):
            model_config[name] = value
    return model_config


def missing(model: LanguageModel, model_config: Settings) -> str | None:
    """What mlx-lm's class insists on, and the file neither says nor implies."""
    if model.is_nested:
        return None
    for name, field in model.mlx_lm.fields.items():
        is_left_out = field.is_required and name not in model.settings and name not in model_config
        if name == "text_config" and model.takes_flat_settings:
            continue
        if is_left_out and not ROTARY.fullmatch(name):
            return (
                f"config.json does not set {name}, which mlx-lm needs for {model.name}; "
                "use the config.json that was saved with the weights"
            )
    return None


def _left_out(model: LanguageModel, name: str, has_output_layer: bool) -> Any:
    """The value of a setting that the file does not have, or has as null."""
    if name == "tie_word_embeddings":
        return is_tied(model, has_output_layer)
    found = _by_another_name(model, name)
    if found is not None or ROTARY.fullmatch(name):
        return found
    if model.transformers and name not in model.settings:
        found = model.transformers.default(name)
    return _derived(model, name) if found is None else found


def is_tied(model: LanguageModel, has_output_layer: bool) -> bool:
    """Whether its output layer is its embedding, by `config.json` or what is meant without a word
    there."""
    given = model.config.get("tie_word_embeddings")
    if isinstance(given, bool):
        return given
    known = model.transformers
    return bool(known and known.default("tie_word_embeddings")) or not has_output_layer


def _by_another_name(model: LanguageModel, name: str) -> Any:
    aliases = model.transformers.aliases.items() if model.transformers else ()
    # A null may be meant, as in `num_shared_experts`; not where transformers has both as one.
    same = _SAME if name not in model.settings else ()
    for names in (*same, *aliases):
        given = (model.settings[each] for each in names if model.settings.get(each) is not None)
        if name in names and (value := next(given, None)) is not None:
            return value
    return None


def _derived(model: LanguageModel, name: str) -> Any:
    """What follows from other settings."""
    settings, default = model.settings, model.mlx_lm.fields[name].default
    if derive := model.own(_DERIVED).get(name):
        return derive(settings)
    if name == "num_key_value_heads" and (default is not None or name in settings):
        return settings.get("num_attention_heads")
    if name == "head_dim" and (default is not None or name in settings):
        return head_dim(settings)
    if name.endswith("_bias") and default is UNKNOWN and model.transformers:
        return False if name not in model.transformers.fields else None
    layers = settings.get("mlp_layer_types")
    if name == "first_k_dense_replace" and isinstance(layers, list):
        return next((i for i, kind in enumerate(layers) if kind != "dense"), len(layers))
    return None
