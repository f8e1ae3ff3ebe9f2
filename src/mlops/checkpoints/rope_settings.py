"""Rotary embeddings: what mlx-lm is told of them, and what is left to the engine.

`rope` reads them from the file. Where mlx-lm's class has a name for what they are, it is told by
that name. What it cannot be told, but its attention can be given, is left to `engine.rope`; what is
neither is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlops.checkpoints.language_settings import LanguageModel
from mlops.checkpoints.library_sources import ModelSource
from mlops.checkpoints.refusal import refusal
from mlops.checkpoints.rope import EVERY_LAYER, TYPES, Rope, head_dim, read_ropes, rotated_dims

_ONLY_MLX_LM = frozenset({"deepseek_yarn", "telechat3-yarn"})
"""Types of rotary embedding that mlx-lm computes and transformers does not have."""

_PARTIAL_NAMES = frozenset({"partial_rotary_factor", "rotary_pct", "rotary_dim"})

_NO_SCALING: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"type": "yarn", "factor": 1.0},
    "minicpm3": {"type": "longrope", "short_factor": 1.0, "long_factor": 1.0},
}
"""A `rope_scaling` that changes nothing, for classes that insist on one."""


@dataclass(frozen=True)
class RopeSettings:
    """What is to be served of rotary embeddings.

    Attributes:
        model_config: settings for mlx-lm, which replace those of the same name.
        ropes: those that the engine has to set itself, of each layer, or one for all; None for a
            layer that keeps its own. Empty: mlx-lm's are right.
        max_context_tokens: up to where they are computed as they were trained; None: everywhere.
        warnings: sentences for the user.
    """

    model_config: Mapping[str, Any]
    ropes: tuple[Rope | None, ...] = ()
    max_context_tokens: int | None = None
    warnings: tuple[str, ...] = ()


def translate_ropes(path: Path, model: LanguageModel, settings: Mapping[str, Any]) -> RopeSettings:
    """Work out what mlx-lm has to be told, and what the engine.

    Args:
        settings: of the file, with what it leaves out.

    Raises:
        PackagingError: one is malformed, or is one that mlx-lm does not compute.
    """
    config, source = settings, model.mlx_lm
    ropes, warnings = read_ropes(path, config)
    _check_types(path, config, ropes, source)
    wanted = _rope_settings(config, ropes, source)
    model_config = {
        name: value
        for name, value in wanted.items()
        if name in source.fields and (name not in config or config[name] != value)
    }
    longest = _longest(config, ropes, warnings)
    left = _left_to_engine(path, config, ropes, source)
    return RopeSettings(model_config, left, longest, tuple(warnings))


def _rope_settings(
    config: Mapping[str, Any], ropes: Mapping[str, Rope | None], source: ModelSource
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
        "rope_scaling": _rope_scaling(config, rope, source),
        "rope_parameters": rope.as_parameters,
    }
    if EVERY_LAYER not in ropes:
        settings["rope_parameters"] = {
            name: entry and entry.as_parameters for name, entry in ropes.items()
        }
    if (dims := head_dim(config)) is not None:
        settings["rotary_dim"] = int(dims * rope.partial)
    return settings


def _rope_scaling(
    config: Mapping[str, Any], rope: Rope, source: ModelSource
) -> dict[str, Any] | None:
    """What the class is to know of the rope's type: nothing, where the engine sets the rope."""
    settings = rope.as_parameters
    has_alpha = "alpha" in source.reads and settings.get("alpha") is not None
    scales_attention = "mscale_all_dim" in source.reads and rope.settings.get("mscale_all_dim")
    if has_alpha or rope.type in _ONLY_MLX_LM or (rope.type != "default" and scales_attention):
        return settings
    none = _NO_SCALING.get(str(config.get("model_type")))
    length = {"original_max_position_embeddings": config.get("max_position_embeddings")}
    return {**none, **length} if none else None


def _left_to_engine(
    path: Path, config: Mapping[str, Any], ropes: Mapping[str, Rope | None], source: ModelSource
) -> tuple[Rope | None, ...]:
    """The ropes that mlx-lm's class would not compute as they are meant; () when it does."""
    unsaid = [reason for rope in ropes.values() if rope for reason in _unsaid(config, rope, source)]
    if len(ropes) > 1 and not source.fields.keys() & {"rope_parameters", "rope_local_base_freq"}:
        unsaid.append("a rotary embedding for each type of layer")
    if not unsaid:
        return ()
    if not source.has_rope:
        raise refusal(
            f"config.json of {path} asks for {unsaid[0]}, which mlx-lm does not compute for "
            f"{config.get('model_type')}; serve it with transformers",
            path,
            architecture=config.get("model_type"),
        )
    if not source.reads & _PARTIAL_NAMES:
        ropes = {name: rope and _with_dims(rope, config) for name, rope in ropes.items()}
    if EVERY_LAYER in ropes:
        return tuple(ropes.values())
    layers = config.get("layer_types")
    if not isinstance(layers, list) or not all(name in ropes for name in layers):
        raise refusal(
            f"rope_parameters in config.json of {path} are for {', '.join(ropes)[:200]}, but its "
            "layer_types are not; use the config.json that was saved with the weights",
            path,
            setting="layer_types",
        )
    return tuple(ropes[name] for name in layers)


def _unsaid(config: Mapping[str, Any], rope: Rope, source: ModelSource) -> list[str]:
    """What of a rope mlx-lm's class would not know or not compute, in words."""
    unsaid = []
    if rope.type not in {"default", "dynamic"} | _ONLY_MLX_LM:
        unsaid.append(f"the rope_type {rope.type}")
    if rope.theta != 10_000 and not source.reads & {"rope_theta", "rotary_emb_base"}:
        unsaid.append(f"rope_theta {rope.theta}")
    is_partial = rope.partial != 1 and "qk_rope_head_dim" not in config
    if is_partial and not source.reads & _PARTIAL_NAMES:
        unsaid.append(f"partial_rotary_factor {rope.partial}")
    return unsaid


def _with_dims(rope: Rope, config: Mapping[str, Any]) -> Rope:
    if rope.type == "proportional" or rope.partial == 1:
        return rope
    return replace(rope, dims=rotated_dims(config, rope.partial))


def _check_types(
    path: Path, config: Mapping[str, Any], ropes: Mapping[str, Rope | None], source: ModelSource
) -> None:
    known = TYPES | (_ONLY_MLX_LM if "rope_scaling" in source.reads else frozenset())
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
