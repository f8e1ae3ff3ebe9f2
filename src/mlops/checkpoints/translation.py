"""What mlx-lm is told in place of what `config.json` says: the same, by the names that it reads.

transformers has renamed settings, and moved some into others. mlx-lm's class for an architecture
reads what it knows and ignores the rest in silence. What it reads is taken from its source
(`architectures`), so there is one rule for all, and short tables for what no rule gives.

What mlx-lm's class cannot be told, but its attention can be given, is left to `engine.rope`; what
is neither is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlops.checkpoints.architectures import ModelClass, find_model_class
from mlops.checkpoints.checkpoint import CONTEXT_TOKENS
from mlops.checkpoints.refusal import refusal
from mlops.checkpoints.rope import EVERY_LAYER, TYPES, Rope, read_ropes, rotated_dims

_ONLY_MLX_LM = frozenset({"deepseek_yarn", "telechat3-yarn"})
"""Types of rotary embedding that mlx-lm computes and transformers does not have."""

_SAME: tuple[tuple[str, ...], ...] = (
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    ("n_ctx", "n_positions", "max_position_embeddings", "model_max_length"),
    ("num_experts_per_tok", "num_experts_per_token"),
    ("n_group", "num_expert_group"),
    ("n_shared_experts", "num_shared_experts"),
    ("norm_topk_prob", "moe_renormalize"),
    ("block_dim", "hidden_size"),
)
"""Names of one setting: where mlx-lm reads one that is not there, another's value is taken."""

_PARTIAL_NAMES = frozenset({"partial_rotary_factor", "rotary_pct", "rotary_dim"})

_FIXED: dict[str, dict[str, Any]] = {
    "apertus": {"mlp_bias": False, "post_norm": False, "qk_norm": True},
    "gemma4_text": {"final_logit_softcapping": None},
    "gemma4_unified_text": {"final_logit_softcapping": None, "hidden_size_per_layer_input": 0},
    "glm_moe_dsa": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    "qwen3_vl_moe_text": {"norm_topk_prob": True},
    "minimax_m2": {"shared_intermediate_size": 0},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "solar_open": {"intermediate_size": 0, "first_k_dense_replace": 0},
}
"""What transformers does where the file says nothing, and mlx-lm's class wants to be told."""

_HYBRID = {"linear_attention": "mamba", "full_attention": "attention"}
_LAYER_TYPES: dict[str, tuple[str, dict[str, str]]] = {
    "granitemoehybrid": ("layer_types", _HYBRID),
    "jamba": ("layers_block_type", _HYBRID),
    "recurrent_gemma": (
        "block_types",
        {"linear_attention": "recurrent", "sliding_attention": "attention"},
    ),
}
"""Where mlx-lm reads the types of layers, and the names that it has for them."""

_PATTERNS = {"gemma3_text": 6, "olmo3": 4}
"""Every how many layers one sees all, where the file does not say it."""

_OTHERWISE: dict[str, tuple[Callable[[Mapping[str, Any]], bool], str]] = {
    "jamba": (
        lambda config: config.get("num_experts") != 1,
        "weighs the experts otherwise than they were trained",
    ),
    "minicpm3": (
        lambda config: config.get("tie_word_embeddings") is not False,
        "leaves out a factor of the logits when tie_word_embeddings is set",
    ),
    "ernie4_5_moe": (
        lambda config: config.get("moe_num_experts") != 0,
        "leaves out the bias that chooses the experts",
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

_NO_SCALING: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"type": "yarn", "factor": 1.0},
    "minicpm3": {"type": "longrope", "short_factor": 1.0, "long_factor": 1.0},
}
"""A `rope_scaling` that changes nothing, for classes that insist on one."""


@dataclass(frozen=True)
class Translation:
    """What is to be served beside what `config.json` says.

    Attributes:
        model_config: settings for mlx-lm, which replace those of the same name.
        ropes: the rotary embeddings that the engine has to set itself, of each layer, or one for
            all; None for a layer that keeps its own. Empty: mlx-lm's are right.
        warnings: sentences for the user.
    """

    model_config: Mapping[str, Any]
    ropes: tuple[Rope | None, ...]
    warnings: tuple[str, ...]


def translate(path: Path, config: Mapping[str, Any]) -> Translation:
    """Work out what mlx-lm has to be told of a `config.json`.

    Raises:
        PackagingError: a setting is malformed, or is one that mlx-lm's class does not compute.
    """
    kind = find_model_class(config)
    text = config.get("text_config")
    if not isinstance(text, dict) or kind is None:
        return _translate(path, config, kind)
    part = find_model_class(text)
    # Of the whole model, whether its output layer is its embedding stands at the top.
    tie = {name: config[name] for name in ("tie_word_embeddings",) if name in config}
    uses_part = part is not None and part.modules <= kind.modules
    inner = _translate(path, text | tie, part if uses_part else kind)
    model_config = dict(inner.model_config)
    outer = {CONTEXT_TOKENS: model_config.pop(CONTEXT_TOKENS, None)}
    outer["text_config"] = {**text, **tie, **model_config}
    if "vocab_size" not in config and "vocab_size" in kind.settings:
        outer["vocab_size"] = text.get("vocab_size")
    given = {name: value for name, value in outer.items() if value is not None}
    return Translation(given, inner.ropes, inner.warnings)


def _translate(path: Path, config: Mapping[str, Any], kind: ModelClass | None) -> Translation:
    if kind is None:
        return Translation({}, (), ())
    _refuse_otherwise(path, config)
    _refuse_irregular_layers(path, config, kind)
    ropes, warnings = read_ropes(path, config)
    _check_types(path, config, ropes, kind)
    wanted = _renamed(config, kind)
    if ropes:
        wanted |= _rope_settings(config, ropes, kind)
    model_config = {
        name: value
        for name, value in wanted.items()
        if name in kind.settings and (name not in config or config[name] != value)
    }
    longest = _longest(config, ropes, warnings)
    if longest is not None:
        model_config[CONTEXT_TOKENS] = longest
    return Translation(model_config, _left_to_engine(path, config, ropes, kind), tuple(warnings))


def _renamed(config: Mapping[str, Any], kind: ModelClass) -> dict[str, Any]:
    """Settings that have another name in the file, or that follow from others in it."""
    fixed = _FIXED.get(str(config.get("model_type")), {})
    renamed = {name: value for name, value in fixed.items() if name not in config}
    for names in _SAME:
        value = next((config[name] for name in names if config.get(name) is not None), None)
        renamed |= {name: value for name in names if value is not None and name not in config}
    name, types = _LAYER_TYPES.get(str(config.get("model_type")), ("", {}))
    given = config.get("layers_block_type") or config.get("layer_types")
    if isinstance(given, list) and all(isinstance(entry, str) for entry in given):
        renamed[name] = [types.get(entry, entry) for entry in given]
    required = kind.required | ({"head_dim"} if config.get("model_type") == "falcon_h1" else set())
    missing = {name for name in required if config.get(name) is None}
    for name, derive in (_DERIVED | _FOLLOWS).items():
        value = derive(config) if name in missing or name in _FOLLOWS else None
        if value is not None:
            renamed[name] = value
    if "sliding_window_pattern" in kind.required and config.get("sliding_window") is None:
        renamed["sliding_window_pattern"] = None
    return renamed


def _head_dim(config: Mapping[str, Any]) -> int | None:
    given, hidden, heads = map(config.get, ("head_dim", "hidden_size", "num_attention_heads"))
    return given or (hidden // heads if type(hidden) is type(heads) is int and heads else None)


def _sliding_window_pattern(config: Mapping[str, Any]) -> int | str | None:
    """Of `layer_types`: every how many layers there is one that is full."""
    layers = config.get("layer_types")
    if not isinstance(layers, list) or "full_attention" not in layers:
        return None
    if config.get("model_type") in {"exaone4", "exaone_moe"}:
        return "".join("L" if name == "sliding_attention" else "G" for name in layers)
    return layers.index("full_attention") + 1


def _refuse_irregular_layers(path: Path, config: Mapping[str, Any], kind: ModelClass) -> None:
    """Some classes only know that every so many layers there is one that is full."""
    layers, pattern = config.get("layer_types"), _sliding_window_pattern(config)
    knows_each = "layer_types" in kind.settings or "sliding_window_pattern" not in kind.settings
    if knows_each or not isinstance(layers, list) or isinstance(pattern, str):
        return
    for number, name in enumerate(layers, 1):
        if pattern is None or (number % pattern == 0) != (name == "full_attention"):
            raise refusal(
                f"layer_types in config.json of {path} do not repeat sliding layers and one full "
                f"layer, which is all that mlx-lm computes for {config.get('model_type')}; serve "
                "it with transformers",
                path,
                setting="layer_types",
            )


def _is_moe_layer(config: Mapping[str, Any]) -> list[bool] | None:
    layers = config.get("mlp_layer_types")
    return [name == "sparse" for name in layers] if isinstance(layers, list) else None


def _mamba_width(config: Mapping[str, Any]) -> int | None:
    """Of mamba2, whose `intermediate_size` mlx-lm wants to be told."""
    hidden, expand = config.get("hidden_size"), config.get("expand")
    return hidden * expand if type(hidden) is type(expand) is int else None


def _time_step_limit(config: Mapping[str, Any]) -> list[Any] | None:
    """Of nemotron_h: transformers only looks at the lower bound."""
    lowest = config.get("time_step_min")
    is_read = config.get("model_type") == "nemotron_h" and isinstance(lowest, float)
    return [lowest, float("inf")] if is_read else None


def _of_full_layers(name: str) -> Callable[[Mapping[str, Any]], Any]:
    """A setting that full layers have to themselves, of what transformers 5 writes by layer."""

    def derive(config: Mapping[str, Any]) -> Any:
        layers = config.get("per_layer_config")
        own = list(layers.values()) if isinstance(layers, dict) else []
        return own[0].get(name) if own and all(isinstance(layer, dict) for layer in own) else None

    return derive


_DERIVED: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "head_dim": _head_dim,
    "intermediate_size": _mamba_width,
    "is_moe_layer": _is_moe_layer,
}
"""Settings that mlx-lm requires and transformers doesn't write: they follow from others."""

_FOLLOWS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "global_head_dim": _of_full_layers("head_dim"),
    "num_global_key_value_heads": _of_full_layers("num_key_value_heads"),
    "sliding_window_pattern": _sliding_window_pattern,
    "time_step_limit": _time_step_limit,
}
"""Settings that transformers 5 overrules by others."""


def _refuse_otherwise(path: Path, config: Mapping[str, Any]) -> None:
    applies, reason = _OTHERWISE.get(str(config.get("model_type")), (lambda _: False, ""))
    if applies(config):
        raise refusal(
            f"{path} cannot be served: mlx-lm's class for {config.get('model_type')} {reason}; "
            "serve it with transformers",
            path,
            architecture=config.get("model_type"),
        )


def _rope_settings(
    config: Mapping[str, Any], ropes: Mapping[str, Rope | None], kind: ModelClass
) -> dict[str, Any]:
    """The rotary embedding by all names that mlx-lm's classes have for it."""
    given = [rope for rope in ropes.values() if rope is not None]
    if not given:
        return {}
    rope = ropes.get("full_attention") or given[0]
    sliding = ropes.get("sliding_attention") or rope
    settings: dict[str, Any] = {
        "rope_theta": rope.theta,
        "rotary_emb_base": rope.theta,
        "rope_local_base_freq": sliding.theta,
        "swa_rope_theta": sliding.theta,
        "partial_rotary_factor": rope.partial,
        "rotary_pct": rope.partial,
        "rope_scaling": _rope_scaling(config, rope, kind),
        "rope_parameters": rope.as_parameters,
    }
    if EVERY_LAYER not in ropes:
        settings["rope_parameters"] = {
            name: entry and entry.as_parameters for name, entry in ropes.items()
        }
    head_dim = _head_dim(config)
    if type(head_dim) is int:
        settings["rotary_dim"] = int(head_dim * rope.partial)
    return settings


def _rope_scaling(config: Mapping[str, Any], rope: Rope, kind: ModelClass) -> dict[str, Any] | None:
    """What the class is to know of the rope's type: nothing, where the engine sets the rope."""
    settings = rope.as_parameters
    has_alpha = "alpha" in kind.reads and settings.get("alpha") is not None
    scales_attention = "mscale_all_dim" in kind.reads and rope.settings.get("mscale_all_dim")
    if has_alpha or rope.type in _ONLY_MLX_LM or (rope.type != "default" and scales_attention):
        return settings
    none = _NO_SCALING.get(str(config.get("model_type")))
    length = {"original_max_position_embeddings": config.get("max_position_embeddings")}
    return {**none, **length} if none else None


def _left_to_engine(
    path: Path, config: Mapping[str, Any], ropes: Mapping[str, Rope | None], kind: ModelClass
) -> tuple[Rope | None, ...]:
    """The ropes that mlx-lm's class would not compute as they are meant; () when it does."""
    unsaid = [reason for rope in ropes.values() if rope for reason in _unsaid(config, rope, kind)]
    if len(ropes) > 1 and not kind.settings & {"rope_parameters", "rope_local_base_freq"}:
        unsaid.append("a rotary embedding for each type of layer")
    if not unsaid:
        return ()
    if not kind.has_rope:
        raise refusal(
            f"config.json of {path} asks for {unsaid[0]}, which mlx-lm does not compute for "
            f"{config.get('model_type')}; serve it with transformers",
            path,
            architecture=config.get("model_type"),
        )
    if not kind.reads & _PARTIAL_NAMES:
        ropes = {name: rope and _with_dims(rope, config) for name, rope in ropes.items()}
    if EVERY_LAYER in ropes:
        return tuple(ropes.values())
    layers = config.get("layer_types") or _layers_by_pattern(config)
    if not isinstance(layers, list) or not all(name in ropes for name in layers):
        raise refusal(
            f"rope_parameters in config.json of {path} are for {', '.join(ropes)[:200]}, but its "
            "layer_types are not; use the config.json that was saved with the weights",
            path,
            setting="layer_types",
        )
    return tuple(ropes[name] for name in layers)


def _layers_by_pattern(config: Mapping[str, Any]) -> list[str] | None:
    """The types of layers that a file says as a number, or leaves out: all but every so many
    slide."""
    pattern = config.get("sliding_window_pattern", _PATTERNS.get(str(config.get("model_type"))))
    num_layers = config.get("num_hidden_layers")
    if type(pattern) is not int or type(num_layers) is not int or pattern < 1:
        return None
    return [
        "sliding_attention" if number % pattern else "full_attention"
        for number in range(1, num_layers + 1)
    ]


def _unsaid(config: Mapping[str, Any], rope: Rope, kind: ModelClass) -> list[str]:
    """What of a rope mlx-lm's class would not know or not compute, in words."""
    unsaid = []
    if rope.type not in {"default", "dynamic"} | _ONLY_MLX_LM:
        unsaid.append(f"the rope_type {rope.type}")
    if rope.theta != 10_000 and not kind.reads & {"rope_theta", "rotary_emb_base"}:
        unsaid.append(f"rope_theta {rope.theta}")
    is_partial = rope.partial != 1 and "qk_rope_head_dim" not in config
    if is_partial and not kind.reads & _PARTIAL_NAMES:
        unsaid.append(f"partial_rotary_factor {rope.partial}")
    return unsaid


def _with_dims(rope: Rope, config: Mapping[str, Any]) -> Rope:
    if rope.type == "proportional" or rope.partial == 1:
        return rope
    return replace(rope, dims=rotated_dims(config, rope.partial))


def _check_types(
    path: Path, config: Mapping[str, Any], ropes: Mapping[str, Rope | None], kind: ModelClass
) -> None:
    known = TYPES | (_ONLY_MLX_LM if "rope_scaling" in kind.reads else frozenset())
    for rope in ropes.values():
        if rope is not None and rope.type not in known:
            raise refusal(
                f"the rope_type {rope.type[:80]!r} in config.json of {path} is unknown for "
                f"{config.get('model_type')}; known are {', '.join(sorted(TYPES))}",
                path,
                setting="rope_type",
            )


def _longest(
    config: Mapping[str, Any], ropes: Mapping[str, Rope | None], warnings: list[str]
) -> int | None:
    """The most tokens that are computed as they were trained, where that is less than all."""
    lengths = []
    whole = config.get("max_position_embeddings")
    for rope in filter(None, ropes.values()):
        if rope.type == "dynamic" and "alpha" not in rope.settings:
            warnings.append(
                "dynamic rotary embeddings only change what is longer than "
                f"max_position_embeddings ({whole}), which is the longest that is served"
            )
        if rope.type != "longrope" or rope.settings["short_factor"] == rope.settings["long_factor"]:
            continue
        length = int(rope.settings["original_max_position_embeddings"])
        if type(whole) is not int or length < whole:
            lengths.append(length)
            warnings.append(
                f"up to {length} tokens are served, not {whole}: past them LongRoPE has other "
                "factors, and would have to compute the whole text anew; for long texts alone, "
                "write long_factor's numbers into short_factor"
            )
    return min(lengths, default=None)
