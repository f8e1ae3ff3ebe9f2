"""What `config.json` says of rotary position embeddings, in all its spellings, checked.

transformers 5 writes `rope_parameters`: one object, or one for each type of layer. Before, there
were `rope_theta`, `rope_scaling` and `partial_rotary_factor` beside each other. Where a file has
both, what wins is what wins in transformers 5, and a warning says so.

`frequencies` works out the numbers that each type stands for. The formulas are those of the papers
and of transformers: linear (position interpolation), llama3, YaRN (arXiv 2309.00071), LongRoPE
(arXiv 2402.13753), proportional.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlops.checkpoints.refusal import refusal

EVERY_LAYER = ""
"""The key of settings that are not given by type of layer."""

TYPES = frozenset({"default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional"})

_SAME_AS = {"mrope": "default", "su": "longrope"}
"""Positions of text are the same in all sections of `mrope`."""

_THETA_NAMES = ("rope_theta", "rotary_emb_base")
_PARTIAL_NAMES = ("partial_rotary_factor", "rotary_pct")
_SLIDING_THETAS: dict[str, tuple[str | None, float]] = {
    "gemma3_text": ("rope_local_base_freq", 10_000.0),
    "gemma3n_text": ("rope_local_base_freq", 10_000.0),
    "olmo3": (None, 500_000.0),
}
"""Of models whose sliding layers have a theta of their own: its old name, and the default."""

_THETAS = {"gemma3_text": 1e6, "gemma3n_text": 1e6, "mixtral": 1e6, "phimoe": 1e6, "minimax": 1e6,
           "minimax_m2": 5e6, "smollm3": 2e6, "lfm2": 1e6, "lfm2_moe": 1e6, "olmo3": 5e5,
           "cohere": 5e5, "bitnet": 5e5, "ernie4_5": 5e5, "ernie4_5_moe": 5e5, "helium": 1e5,
           "gpt_oss": 1.5e5, "apertus": 12e6, "llama4_text": 5e5, "longcat_flash": 1e7,
           "solar_open": 1e6}  # fmt: skip
_PARTIALS = {"glm": 0.5, "glm4": 0.5, "glm4_moe": 0.5, "gpt_neox": 0.25, "nemotron": 0.5,
             "phi": 0.5, "qwen3_5_text": 0.25, "qwen3_5_moe_text": 0.25, "qwen3_next": 0.25,
             "recurrent_gemma": 0.5, "stablelm": 0.25}  # fmt: skip
"""What a setting is that the file leaves out, where it is not 10000 and the whole head."""


@dataclass(frozen=True)
class Rope:
    """The rotary position embedding of a layer.

    Attributes:
        theta: the base of the wavelengths.
        type: one of `TYPES`, or a name that only mlx-lm knows.
        partial: share of each head that is rotated.
        settings: the type's own, as transformers names them: `factor`, `beta_fast`, …
        dims: how many numbers of each head are rotated; None: as many as mlx-lm takes.
    """

    theta: float
    type: str = "default"
    partial: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    dims: int | None = None

    @property
    def as_parameters(self) -> dict[str, Any]:
        """As transformers 5 writes it, with the type by its old name too."""
        return {
            **self.settings,
            "rope_theta": self.theta,
            "rope_type": self.type,
            "type": self.type,
            "partial_rotary_factor": self.partial,
        }


def read_ropes(path: Path, config: Mapping[str, Any]) -> tuple[dict[str, Rope | None], list[str]]:
    """The rotary embeddings by type of layer (None: it has none), and warnings.

    Args:
        path: of the checkpoint, for messages.
        config: content of `config.json`, or its `text_config`.

    Returns:
        Empty where the configuration says nothing. One entry, `EVERY_LAYER`, where layers do not
        differ.

    Raises:
        PackagingError: a value is none that can be computed with; the message names it.
    """
    new, old = (_object(path, config, name) for name in ("rope_parameters", "rope_scaling"))
    flat_names = (*_THETA_NAMES, *_PARTIAL_NAMES, "rope_local_base_freq")
    if not new and not old and all(config.get(name) is None for name in flat_names):
        return {}, []
    warnings: list[str] = []
    entries: dict[str, dict[str, Any] | None]
    kind = str(config.get("model_type"))
    by_layer = _by_layer(path, config, new)
    nested = {name: value for name, value in by_layer.items() if value is not None}
    if kind in _SLIDING_THETAS:
        given = nested or {"full_attention": new}
        full = {**given.get("full_attention", {}), **old}
        sliding = given.get("sliding_attention", {})
        entries = {"sliding_attention": sliding, "full_attention": full}
    elif old:
        entries = {EVERY_LAYER: old}
    elif nested:
        entries = by_layer
    else:
        entries = {EVERY_LAYER: new}
    ropes: dict[str, Rope | None] = {
        name: None if entry is None else _read(path, config, name, entry, warnings)
        for name, entry in entries.items()
    }
    if old and new:
        _warn_of_both(new, next(rope for rope in reversed(ropes.values()) if rope), warnings)
    if len(set(map(repr, ropes.values()))) == 1:
        ropes = {EVERY_LAYER: next(iter(ropes.values()))}
    return ropes, list(dict.fromkeys(warnings))


def _by_layer(
    path: Path, config: Mapping[str, Any], parameters: dict[str, Any]
) -> dict[str, dict[str, Any] | None]:
    """What of `rope_parameters` is for a type of layer; None: those have no rotary embedding."""
    layers = config.get("layer_types")
    labels = layers if isinstance(layers, list) else []
    found = {}
    for name, value in parameters.items():
        if name in labels or name.endswith("attention"):
            if not isinstance(value, dict | None):
                raise _bad(path, f"rope_parameters.{name[:80]}", value, "an object")
            found[name] = value
    return found


def frequencies(rope: Rope, dims: int) -> tuple[list[float], float]:
    """What is computed with: wavelengths / 2π, of `dims / 2` pairs, and the factor of sine, cosine.

    Args:
        dims: how many numbers of a head are rotated; with `proportional` all of them.
    """
    settings = rope.settings
    plain = [rope.theta ** (2 * i / dims) for i in range(dims // 2)]
    factor = settings.get("factor") or 1.0
    if rope.type == "linear":
        return [factor * value for value in plain], 1.0
    if rope.type == "llama3":
        return [_llama3(value, settings) for value in plain], 1.0
    if rope.type == "yarn":
        return _yarn(rope, dims, plain), _yarn_attention(settings)
    if rope.type == "longrope":
        stretch = settings["short_factor"]
        return [a * b for a, b in zip(stretch, plain, strict=True)], _long_attention(settings)
    if rope.type == "proportional":
        num_rotated = int(rope.partial * dims // 2)
        rest = [math.inf] * (dims // 2 - num_rotated)
        return [factor * value for value in plain[:num_rotated]] + rest, 1.0
    return plain, 1.0


def _llama3(value: float, settings: Mapping[str, Any]) -> float:
    length, factor = settings["original_max_position_embeddings"], settings["factor"]
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    num_turns = length / (2 * math.pi * value)
    smooth = min(max((num_turns - low) / (high - low), 0.0), 1.0)
    return float(value / ((1 - smooth) / factor + smooth))


def _yarn(rope: Rope, dims: int, plain: list[float]) -> list[float]:
    settings = rope.settings
    length, factor = settings["original_max_position_embeddings"], settings["factor"]

    def dimension(num_turns: float) -> float:
        return dims * math.log(length / (num_turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = dimension(settings.get("beta_fast") or 32)
    high = dimension(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    high += 0.001 if low == high else 0
    ramp = (min(max((i - low) / (high - low), 0.0), 1.0) for i in range(dims // 2))
    return [value / (share / factor + 1 - share) for value, share in zip(plain, ramp, strict=True)]


def _yarn_attention(settings: Mapping[str, Any]) -> float:
    own = settings.get("attention_factor")
    if own is not None:
        return float(own)
    scale, all_dims = settings.get("mscale"), settings.get("mscale_all_dim")
    growth = 0.1 * math.log(max(settings["factor"], 1.0))
    if scale and all_dims:
        return float((growth * scale + 1) / (growth * all_dims + 1))
    return growth + 1


def _long_attention(settings: Mapping[str, Any]) -> float:
    for name in ("short_mscale", "attention_factor"):
        if settings.get(name) is not None:
            return float(settings[name])
    length, factor = settings["original_max_position_embeddings"], settings["factor"]
    return math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0


def _read(
    path: Path, config: Mapping[str, Any], layers: str, entry: dict[str, Any], warnings: list[str]
) -> Rope:
    kind = str(config.get("model_type"))
    names: tuple[str, ...] = _THETA_NAMES
    default = _THETAS.get(kind, 10_000.0)
    if layers == "sliding_attention" and kind in _SLIDING_THETAS:
        name, default = _SLIDING_THETAS[kind]
        names = (name,) if name else ()
    theta = _pick(_given(config, names), "rope_theta", entry.get("rope_theta"), default, warnings)
    default = _PARTIALS.get(kind, 1.0)
    has_dims = _is_number(config.get("rotary_dim")) and _is_number(config.get("head_dim"))
    if kind == "minimax_m2" and has_dims:
        default = config["rotary_dim"] / config["head_dim"]
    given, own = _given(config, _PARTIAL_NAMES), entry.get("partial_rotary_factor")
    partial = _pick(given, "partial_rotary_factor", own, default, warnings)
    rope_type = entry.get("rope_type", entry.get("type")) or "default"
    if not isinstance(rope_type, str):
        raise _bad(path, "rope_type", rope_type, "a name")
    rope_type = _SAME_AS.get(rope_type, rope_type)
    if kind.startswith("phi3") and rope_type == "yarn":
        rope_type = "longrope"
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    settings = {name: value for name, value in entry.items() if name not in known}
    rope = Rope(theta, rope_type, partial, settings)
    for name, value in (("rope_theta", theta), ("partial_rotary_factor", partial)):
        _check_positive(path, name, value)
    if partial > 1:
        raise _bad(path, "partial_rotary_factor", partial, "a share of at most 1")
    return _completed(path, config, rope) if rope_type in TYPES - {"default"} else rope


def _completed(path: Path, config: Mapping[str, Any], rope: Rope) -> Rope:
    """With all that its type needs, or `PackagingError`."""
    settings = {name: value for name, value in rope.settings.items() if value is not None}
    whole = config.get("max_position_embeddings")
    if whole is not None and not _is_number(whole):
        raise _bad(path, "max_position_embeddings", whole, "a possible number")
    if rope.type in {"llama3", "yarn", "longrope"}:
        length = config.get("original_max_position_embeddings")
        length = length or settings.get("original_max_position_embeddings") or whole
        settings["original_max_position_embeddings"] = length
        if type(length) is not int or length < 2 or not _is_number(length):
            raise _bad(path, "original_max_position_embeddings", length, "a positive number")
        if rope.type != "llama3" and "factor" not in settings and type(whole) is int:
            settings["factor"] = whole / length
    needed = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "longrope": ("factor",),
    }.get(rope.type, ())
    optional = ("factor", "beta_fast", "beta_slow", "attention_factor", "short_mscale")
    for name in (*needed, *(name for name in optional if name in settings)):
        _check_positive(path, name, settings.get(name))
    for name in ("mscale", "mscale_all_dim"):
        if not _is_number(settings.get(name, 0.0)):
            raise _bad(path, name, settings[name], "a number")
    if rope.type == "llama3" and settings["high_freq_factor"] <= settings["low_freq_factor"]:
        raise _bad(
            path, "high_freq_factor", settings["high_freq_factor"], "more than low_freq_factor"
        )
    if rope.type == "yarn" and rope.theta <= 1:
        raise _bad(path, "rope_theta", rope.theta, "more than 1")
    if rope.type == "longrope":
        for name in ("short_factor", "long_factor"):
            _check_factors(path, name, settings.get(name), rotated_dims(config, rope.partial))
    return replace(rope, settings=settings)


def head_dim(config: Mapping[str, Any]) -> int | None:
    """How many numbers each head has; None when that does not stand there."""
    given, hidden, heads = map(config.get, ("head_dim", "hidden_size", "num_attention_heads"))
    if given is None and type(hidden) is type(heads) is int and heads > 0:
        given = hidden // heads
    return given if type(given) is int and _is_number(given) else None


def rotated_dims(config: Mapping[str, Any], partial: float) -> int | None:
    """How many numbers of each head are rotated; None when that does not stand there."""
    if (dims := config.get("qk_rope_head_dim")) is not None:
        return dims if type(dims) is int else None
    return None if (dims := head_dim(config)) is None else int(dims * partial)


def _check_factors(path: Path, name: str, value: Any, dims: int | None) -> None:
    if not isinstance(value, list):
        raise _bad(path, name, value, "a list of numbers")
    for factor in value:
        _check_positive(path, name, factor)
    if dims is not None and len(value) != dims // 2:
        raise refusal(
            f"config.json has {len(value)} numbers in {name}, but {dims // 2} pairs of each head "
            "are rotated; use the config.json that was saved with the weights",
            path,
            setting=name,
        )


def _object(path: Path, config: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _bad(path, name, value, "an object")
    return value


def _given(config: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: config[name] for name in names if config.get(name) is not None}


def _pick(
    given: Mapping[str, Any], own_name: str, own: Any, default: float, warnings: list[str]
) -> Any:
    """A setting's value: its `own` of the object, else `given` at the file's top, else default."""
    for name, value in given.items():
        if own is not None and own != value:
            warnings.append(
                f"config.json says that {name} is {str(value)[:80]!r}, and within rope_parameters "
                f"that {own_name} is {str(own)[:80]!r}: the latter is used, as transformers does"
            )
    return own if own is not None else next(iter(given.values()), default)


def _warn_of_both(new: Mapping[str, Any], rope: Rope, warnings: list[str]) -> None:
    given = new.get("full_attention") if isinstance(new.get("full_attention"), dict) else new
    for name, value in (given or {}).items():
        used = rope.as_parameters.get(name)
        if name != "type" and value != used:
            warnings.append(
                f"config.json has both rope_scaling and rope_parameters, where {name[:80]!r} is "
                f"{str(value)[:80]!r}: it is {str(used)[:80]!r}, as rope_scaling wins in "
                "transformers"
            )


def _check_positive(path: Path, name: str, value: Any) -> None:
    if not _is_number(value) or value <= 0:
        raise _bad(path, name, value, "a positive number")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _bad(path: Path, name: str, value: Any, wanted: str) -> Exception:
    return refusal(
        f"{name} in config.json is {str(value)[:80]!r}, not {wanted}; use the config.json that was "
        "saved with the weights",
        path,
        file="config.json",
        setting=name,
    )
