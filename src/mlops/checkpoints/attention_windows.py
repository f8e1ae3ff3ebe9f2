"""How far attention reaches back: layers with a sliding window, and what mlx-lm knows of them.

Where mlx-lm's class has no window, the context ends with it: up to there both compute the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlops.checkpoints.consistency import MAX_MODULES
from mlops.checkpoints.language_settings import LanguageModel
from mlops.counts import count

_PATTERNS = {"cohere2": 4, "gemma3_text": 6, "olmo3": 4}
"""Every how many layers there is one that sees all, where the file has neither their types nor
`sliding_window_pattern`: what both libraries take then."""

_LOOKED_FOR = re.compile(r"layer_types\.index\(\"((?:full|sliding)_attention)\"\)")
_SAME_WITHOUT_WINDOW = frozenset({"llama", "ministral3"})
"""Layers with a window differ in nothing else, and are left without one where no type is given."""


@dataclass(frozen=True)
class Attention:
    """What comes of settings that limit how far attention reaches back."""

    model_config: Mapping[str, Any]
    max_context_tokens: int | None = None
    warnings: tuple[str, ...] = ()
    problem: str = ""


def read_windows(model: LanguageModel) -> Attention:
    """What its layers see of a text, as far as mlx-lm computes it."""
    if problem := _wrong_types(model):
        return Attention({}, problem=problem)
    types, chunk = model.layer_types, model.value("attention_chunk_size")
    is_computed = "attention_chunk_size" in model.mlx_lm.used
    has_chunks = not is_computed and set(types or ()) != {"full_attention"}
    if has_chunks and isinstance(chunk, int) and model.transformers:
        return _capped(model, chunk, "attention_chunk_size")
    window = _window(model)
    if "layer_types" in model.mlx_lm.used:
        return _by_layer_types(model, window)
    if "sliding_window_pattern" in model.mlx_lm.used:
        return _by_pattern(model, types)
    has_window = "sliding_window_size" in model.mlx_lm.used or (
        "sliding_window" in model.mlx_lm.used and types is None
    )
    if window is None or has_window:
        return Attention({})
    return _capped(model, window, "sliding_window")


def types_of_layers(model: LanguageModel) -> list[Any] | None:
    """`layer_types`, or what they are where the file has none: one in so many layers sees all."""
    if model.layer_types is not None:
        return model.layer_types
    pattern = model.settings.get("sliding_window_pattern", _PATTERNS.get(model.module))
    if model.module not in _PATTERNS or type(pattern) is not int or pattern < 1:
        return None
    numbers = range(1, min(model.num_layers, MAX_MODULES) + 1)
    return ["sliding_attention" if number % pattern else "full_attention" for number in numbers]


def _wrong_types(model: LanguageModel) -> str:
    """Why `layer_types` cannot be meant, a sentence."""
    types = model.layer_types
    if types is None:
        return ""
    if not all(isinstance(each, str) for each in types):
        return "layer_types in config.json is not a list of names"
    if len(types) != model.num_layers:
        named = count(len(types), "layer")
        return (
            f"layer_types in config.json names {named}, num_hidden_layers says {model.num_layers}"
        )
    return ""


def _window(model: LanguageModel) -> int | None:
    """Tokens that a layer with a sliding window sees; None when no layer has one."""
    known, types = model.transformers, model.layer_types
    window = model.value("sliding_window")
    has_none = known is not None and "sliding_window" not in known.fields
    if has_none or not isinstance(window, int) or window < 1:
        return None
    if model.value("use_sliding_window") is False:
        return None
    if types is not None:
        return window if "sliding_attention" in types else None
    full = model.value("max_window_layers")
    if isinstance(full, int) and full >= model.num_layers and model.name != "qwen2_moe":
        return None
    return window


def _by_layer_types(model: LanguageModel, window: int | None) -> Attention:
    """mlx-lm's class has windows, where `layer_types` says so."""
    types = model.layer_types
    if model.module == "exaone_moe" and window is None and model.value("sliding_window"):
        return Attention({}, problem=_no_such_order(model))  # it would rotate in all layers
    if (
        model.module in _SAME_WITHOUT_WINDOW
        and window is not None
        and (types is None or "full_attention" not in types)
    ):
        # Without a layer that sees all, mlx-lm's class cannot be made.
        model_config = {} if types is None else {"layer_types": ["full_attention"] * len(types)}
        return _capped(model, window, "sliding_window", model_config)
    looked_for = _LOOKED_FOR.findall(model.mlx_lm.text)
    if types is not None and not set(looked_for) <= set(types):
        return Attention({}, problem=_no_such_order(model))
    return Attention({})


def _by_pattern(model: LanguageModel, types: list[Any] | None) -> Attention:
    """mlx-lm's class takes one number, or letters: each so many layers, one without a window."""
    is_text = "str" in model.mlx_lm.fields["sliding_window_pattern"].types
    if types is None and is_text and model.value("sliding_window") is None:
        return Attention({"sliding_window_pattern": None})
    if types is None:
        return Attention({})
    if is_text:
        letters = "".join("L" if kind == "sliding_attention" else "G" for kind in types)
        if set(letters) == {"L", "G"}:
            return Attention({"sliding_window_pattern": letters})
        if model.value("sliding_window") is None:
            return Attention({"sliding_window_pattern": None})
    for pattern in range(1, len(types) + 1):
        made = [(i + 1) % pattern != 0 for i in range(len(types))]
        if not is_text and made == [kind == "sliding_attention" for kind in types]:
            return Attention({"sliding_window_pattern": pattern})
    return Attention({}, problem=_no_such_order(model))


def _no_such_order(model: LanguageModel) -> str:
    return (
        "the order of layers with and without a sliding window (layer_types in config.json) is one "
        f"that mlx-lm does not compute for {model.name}; a newer mlx-lm may do it"
    )


def _capped(
    model: LanguageModel, window: int, name: str, model_config: Mapping[str, Any] | None = None
) -> Attention:
    context = model.settings.get("max_position_embeddings")
    if isinstance(context, int) and context <= window:
        return Attention(model_config or {})
    warning = (
        f"mlx-lm has no sliding window for {model.name}, and {name} is {window} in config.json: "
        f"prompt and answer together are held to {window} tokens, as far as both compute the same"
    )
    return Attention(model_config or {}, window, (warning,))
