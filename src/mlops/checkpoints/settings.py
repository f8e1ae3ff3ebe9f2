"""Does mlx-lm compute what the settings in `config.json` say?

    the settings -> are their values possible? -> what mlx-lm must be told -> what it cannot do

Nothing is ignored in silence. A setting that transformers' model reads and mlx-lm's does not is
told by a name that mlx-lm knows; or it has the value with which both compute the same; or the
context is held to where they do; or the checkpoint is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlops.checkpoints.attention_windows import read_windows, types_of_layers
from mlops.checkpoints.checkpoint import CONTEXT_TOKENS
from mlops.checkpoints.language_settings import ROTARY, LanguageModel
from mlops.checkpoints.refusal import refusal
from mlops.checkpoints.rope import Rope
from mlops.checkpoints.rope_settings import translate_ropes
from mlops.checkpoints.setting_values import impossible_values
from mlops.checkpoints.translation import is_tied, missing, refuse_otherwise, translate
from mlops.checkpoints.uncomputed import not_computed, unread


@dataclass(frozen=True)
class Honoured:
    """What is to be served beside what `config.json` says.

    Attributes:
        model_config: what mlx-lm is given in place of what `config.json` says, and under
            `CONTEXT_TOKENS` where its model begins to compute something else.
        ropes: the rotary embeddings that the engine has to set itself, of each layer, or one for
            all; None for a layer that keeps its own. Empty: mlx-lm's are right.
        warnings: what its user should know, a sentence each.
    """

    model_config: Mapping[str, Any]
    ropes: tuple[Rope | None, ...]
    warnings: tuple[str, ...]


def honour_settings(path: Path, config: Mapping[str, Any], tensor_names: Iterable[str]) -> Honoured:
    """Hold the settings of a language model against what mlx-lm computes.

    Args:
        config: `config.json`, with what is already known to be given in its place. mlx-lm has its
            architecture.
        tensor_names: as they are in the weight files.

    Raises:
        PackagingError: a setting has a value that is not possible, or that mlx-lm does not compute.
    """
    model = LanguageModel.of(config)
    has_output_layer = any(map(_is_output_layer, tensor_names))
    refuse_otherwise(path, model.settings)
    for problem in impossible_values(model.settings, _types(model)):
        raise _refuse(path, f"{problem}; use the config.json that was saved with the weights")
    translated = translate(model, has_output_layer)
    windows = read_windows(model)
    problems = (
        missing(model, {**translated, **windows.model_config}),
        windows.problem,
        *not_computed(model, has_output_layer),
    )
    for problem in filter(None, problems):
        raise _refuse(path, problem)
    ropes = translate_ropes(path, model, _completed(model, translated))
    model_config = model.as_model_config(
        {**translated, **ropes.model_config, **windows.model_config}
    )
    limits = (windows.max_context_tokens, ropes.max_context_tokens)
    if known := [limit for limit in limits if limit is not None]:
        model_config[CONTEXT_TOKENS] = min(known)
    return Honoured(model_config, ropes.ropes, (*ropes.warnings, *windows.warnings, *unread(model)))


def _completed(model: LanguageModel, translated: Mapping[str, Any]) -> dict[str, Any]:
    """The file's settings, and what is meant by those that it leaves out."""
    given = {name: value for name, value in model.settings.items() if value is not None}
    return {**translated, "layer_types": types_of_layers(model), **given}


def is_said_tied(config: Mapping[str, Any]) -> bool:
    """Whether its output layer is its embedding, whatever tensors there are."""
    return is_tied(LanguageModel.of(config), has_output_layer=True)


def _types(model: LanguageModel) -> dict[str, frozenset[str]]:
    """What the settings that mlx-lm reads may be: its annotations are narrower than its code."""
    known = model.transformers.fields if model.transformers else {}
    return {
        name: model.mlx_lm.fields[name].types | (known[name].types if name in known else set())
        for name in model.mlx_lm.used
        if not ROTARY.fullmatch(name)
    }


def _is_output_layer(name: str) -> bool:
    return name.endswith(("lm_head.weight", "embed_out.weight")) or name == "output.weight"


def _refuse(path: Path, problem: str) -> Exception:
    return refusal(f"{path}: {problem}", path, problem=problem)
