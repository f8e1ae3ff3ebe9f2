"""The settings of a model's text part, and what mlx-lm and transformers know of them: one record.

`translation`, `attention_windows`, `rope_settings` and `uncomputed` all start from it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from mlops.checkpoints import architectures, library_sources
from mlops.checkpoints.library_sources import ModelSource

Entry = TypeVar("Entry")

ROTARY = re.compile(
    r"rope.*|.*rope_.*|rotary.*|partial_rotary\w*|original_max_position_embeddings|no_rope_layer\w*"
    r"|max_position_embeddings|swa_rope\w*"
)
"""Names of settings that `rope_settings` takes care of, with the length of the context."""

WINDOWS = frozenset(
    {
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
        "sliding_window_pattern",
        "attention_chunk_size",
    }
)
"""Names of settings that `attention_windows` takes care of."""

_FLOATS = ("Infinity", "-Infinity")
_WRAPS_FLAT_SETTINGS = '"text_config" not in params'


@dataclass(frozen=True)
class LanguageModel:
    """The settings of the part that makes text.

    Attributes:
        name: the `model_type` of the whole model, for sentences.
        module: of mlx-lm, that computes it.
        config: the whole `config.json`.
        settings: the same, or `text_config` in it where mlx-lm reads that.
        is_nested: the latter.
        mlx_lm: what mlx-lm reads for it.
        transformers: the same of transformers; None where it does not know the architecture.
        wrapper: what mlx-lm reads for the whole model.
    """

    name: str
    module: str
    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    is_nested: bool
    mlx_lm: ModelSource
    transformers: ModelSource | None
    wrapper: ModelSource

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LanguageModel:
        """Find them for a `config.json` whose architecture mlx-lm has."""
        name, module = str(config["model_type"]), architectures.module_name(config)
        wrapper = mlx_lm = library_sources.of_mlx_lm(module)
        settings, text, types = config, config.get("text_config"), [name]
        has_text_part = "text_config" in wrapper.fields
        if has_text_part:
            types = [f"{name}_text"]
        if has_text_part and isinstance(text, dict):
            # Whether the output layer is the embedding stands at the top, for the whole model.
            tie = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
            settings = {**text, **tie}
            types = [str(text.get("model_type")), *types]
            parts = map(architectures.module_name, (settings, {"model_type": f"{name}_text"}))
            if part := next((each for each in parts if each in wrapper.modules), None):
                module, mlx_lm = part, library_sources.of_mlx_lm(part)
        known = map(library_sources.of_transformers, types)
        transformers = next((found for found in known if found), None)
        is_nested = settings is not config
        return cls(name, module, config, settings, is_nested, mlx_lm, transformers, wrapper)

    @property
    def model_type(self) -> str:
        """Of the text part."""
        return str(self.settings.get("model_type") or self.module)

    @property
    def takes_flat_settings(self) -> bool:
        """Of a class with `text_config`: it also takes a file without one."""
        return _WRAPS_FLAT_SETTINGS in self.wrapper.text

    @property
    def layer_types(self) -> list[Any] | None:
        found = self.settings.get("layer_types")
        return found if isinstance(found, list) else None

    @property
    def num_layers(self) -> int:
        found = self.value("num_hidden_layers")
        return found if isinstance(found, int) else 0

    def value(self, name: str) -> Any:
        """Of a setting, or what transformers takes when it is left out."""
        if name in self.settings:
            return self.settings[name]
        return self.transformers.default(name) if self.transformers else None

    def own(self, table: Mapping[str, Mapping[str, Entry]]) -> Mapping[str, Entry]:
        """Its entries of a table that goes by `model_type` or by mlx-lm's module."""
        return table.get(self.model_type, table.get(self.module, {}))

    def as_model_config(self, model_config: Mapping[str, Any]) -> dict[str, Any]:
        """Settings for mlx-lm, at the level where it reads them."""
        if not self.is_nested:
            return dict(model_config)
        whole = {"text_config": {**self.settings, **model_config}}
        size = self.settings.get("vocab_size")
        if "vocab_size" in self.wrapper.fields.keys() - self.config.keys() and size is not None:
            whole["vocab_size"] = size
        return whole


def as_number(value: Any) -> Any:
    """A value as JSON cannot say it: transformers writes `{"__float__": "Infinity"}`."""
    if isinstance(value, dict) and list(value) == ["__float__"]:
        return float(value["__float__"]) if value["__float__"] in _FLOATS else value
    return [as_number(each) for each in value] if isinstance(value, list) else value


def shown(value: Any) -> str:
    """A value in a sentence."""
    text = "left out" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
