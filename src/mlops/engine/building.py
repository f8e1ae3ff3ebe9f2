"""mlx-lm's model for a checkpoint, built lazily: names and shapes are compared, no weight is read.

Loading goes on from here (`loading`), and packaging stops here (`servable`): what one refuses, the
other refuses with the same sentence.

    config.json -> mlx-lm's classes -> an empty model -> the tensors under the model's names
    -> quantized layers where the tensors are -> every tensor has its place, and every place its
    tensor

Owner thread only.
"""

# mypy: disable-error-code="misc, no-any-return, valid-type"
# mlx-lm's classes have no types.

from __future__ import annotations

import logging
import re
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlops.checkpoints import Checkpoint
from mlops.checkpoints.output_layer import has_copied_output_layer
from mlops.checkpoints.refusal import examples, refusal
from mlops.checkpoints.tensors import MLX_BITS, MLX_GROUP_SIZES
from mlops.engine.model_folder import model_folder
from mlops.engine.weight_forms import UnfitWeightsError, fit_weights
from mlops.errors import PackagingError, sentence_of

if TYPE_CHECKING:
    import mlx.core as mx
    from mlx import nn

logger = logging.getLogger(__name__)

_LACKING = re.compile(r"__init__\(\) missing \d+ required positional arguments?: (.+)$")


def build_model(checkpoint: Checkpoint) -> tuple[nn.Module, dict[str, Any]]:
    """Build the model of a language model's checkpoint; its weights are read when computed with.

    Returns:
        mlx-lm's model, and `config.json` as mlx-lm reads it.

    Raises:
        PackagingError: its configuration or its tensors are not what mlx-lm's code for the
            architecture needs.
    """
    from mlops.engine.grouped_masks import fit_masks
    from mlops.engine.mlx_lm import load_model
    from mlops.engine.rope import set_ropes

    settings = {**checkpoint.model_config, "model_type": checkpoint.architecture}
    if checkpoint.is_headless:
        # Its output layer is the embedding: nothing asks for it, but mlx-lm's models have one.
        settings["tie_word_embeddings"] = True
    build = _Build(checkpoint)
    try:
        with model_folder(checkpoint) as folder:
            model, config = load_model(
                folder,
                lazy=True,
                trust_remote_code=False,
                model_config=settings,
                get_model_classes=build.find_classes,
            )
        set_ropes(model, checkpoint.ropes)
        fit_masks(model, checkpoint.architecture)
    except PackagingError:
        raise
    except Exception as exc:
        raise build.explain(exc) from exc
    return model, config


class _Build:
    """One build under way: whether the model is there, for the sentence that says what failed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config: Mapping[str, Any] = checkpoint.config
        self.has_model = False

    def find_classes(self, config: dict[str, Any]) -> tuple[Any, Any]:
        """mlx-lm's classes, which look at the tensors before they take them."""
        from mlops.engine.mlx_lm import find_model_classes
        from mlops.engine.routing import keep_to_groups

        build = self
        try:
            model_class, args_class = find_model_classes(config)
        except SystemExit as exc:  # a module of mlx-lm that lacks a library ends the process
            raise self._refusal(
                f"{self.checkpoint.path} cannot be served: mlx-lm's code for "
                f"{self.checkpoint.architecture} needs a library that is not installed"
            ) from exc
        self.config = config

        class Model(model_class):
            def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
                build.has_model = True
                weights = build.fit_weights(self, weights)
                inherited = getattr(super(), "sanitize", None)
                weights = inherited(weights) if inherited else weights
                keep_to_groups(build.config, weights)
                build.check_packing(self, weights)
                return weights

            def load_weights(self, weights: Any, strict: bool = True) -> nn.Module:
                given = build.without_copy(self, _without_wavelengths(dict(weights)))
                build.check_tensors(self, given)
                return super().load_weights(list(given.items()), strict)

        Model.__module__ = model_class.__module__
        return Model, args_class

    def fit_weights(self, model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The tensors in the form that mlx-lm's class reads."""
        try:
            return fit_weights(self.checkpoint, model, weights)
        except UnfitWeightsError as exc:
            raise self._refusal(f"{self.checkpoint.path} cannot be served: {exc}") from exc

    def without_copy(self, model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Leave out a copy of the embedding, where the model has no other output layer."""
        extra = [name for name in weights if name.endswith("lm_head.weight")]
        if not extra or any(name.endswith("lm_head") for name, _ in model.named_modules()):
            return weights
        if not has_copied_output_layer(self.checkpoint.path, self.checkpoint.tensors):
            return weights
        return {name: array for name, array in weights.items() if name not in extra}

    def check_packing(self, model: nn.Module, weights: Mapping[str, mx.array]) -> None:
        """Refuse scales that MLX would divide by zero for, which ends the process."""
        modules = dict(model.named_modules())
        for name, scales in weights.items():
            path, _, leaf = name.rpartition(".")
            module = modules.get(path)
            if leaf != "scales" or module is None or not hasattr(module, "to_quantized"):
                continue
            columns, bits = module.weight.shape[-1], 4
            num_groups = scales.shape[0 if f"{path}.qweight" in weights else -1]
            if f"{path}.qweight" not in weights:
                bits = weights[f"{path}.weight"].shape[-1] * 32 // max(1, columns)
            group_size = columns // num_groups if num_groups else 0
            if group_size not in MLX_GROUP_SIZES or bits not in MLX_BITS:
                raise self._refusal(
                    f"by config.json the weight of {path} in {self.checkpoint.path} has {columns} "
                    f"columns, so its tensors would be numbers of {bits} bits in groups of "
                    f"{group_size}, which MLX does not have; use the config.json that was saved "
                    "with the weights",
                    tensor=name,
                )

    def check_tensors(self, model: nn.Module, weights: Mapping[str, mx.array]) -> None:
        """Every tensor has a place in the model, of its shape, and every place has a tensor."""
        import mlx.core as mx
        from mlx.utils import tree_flatten

        wanted: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
        missing = sorted(wanted.keys() - weights.keys())
        unexpected = sorted(weights.keys() - wanted.keys())
        if missing or unexpected:
            problems = [f"{examples(missing)} missing"] if missing else []
            if unexpected:
                problems.append(f"no place for {examples(unexpected)}")
            raise self._refusal(
                f"the tensors in {self.checkpoint.path} are not those of mlx-lm's "
                f"{self.checkpoint.architecture}: {'; '.join(problems)}; copy or download the "
                "model again, with its own config.json",
                missing=missing[:10],
                unexpected=unexpected[:10],
            )
        for name, array in wanted.items():
            found = weights[name]
            if found.shape != array.shape:
                raise self._refusal(
                    f"{name} in {self.checkpoint.path} is {_shape(found)}, but by config.json "
                    f"{_shape(array)}; use the config.json that was saved with the weights",
                    tensor=name,
                )
            if mx.issubdtype(found.dtype, mx.floating) != mx.issubdtype(array.dtype, mx.floating):
                raise self._refusal(
                    f"{name} in {self.checkpoint.path} is stored as {_dtype(found)}, which "
                    f"mlx-lm's {self.checkpoint.architecture} does not compute with: give "
                    "the weights before they were quantized",
                    tensor=name,
                )

    def explain(self, exc: Exception) -> PackagingError:
        """What an error of mlx-lm's means, in the terms of who has the checkpoint."""
        path, architecture = self.checkpoint.path, self.checkpoint.architecture
        same = "use the config.json that was saved with the weights"
        if lacking := _LACKING.search(str(exc)):
            names = re.findall(r"'(\w+)'", lacking[1])
            return self._refusal(
                f"config.json in {path} lacks {', '.join(names)}, which mlx-lm needs for "
                f"{architecture}; {same}",
                missing=names,
            )
        if isinstance(exc, KeyError) and self.has_model:
            return self._refusal(
                f"the tensor {_line(exc.args[0])} is missing from {path}, or named otherwise than "
                f"mlx-lm's {architecture} has it; copy or download the model again"
            )
        if isinstance(exc, KeyError):
            return self._refusal(
                f"config.json in {path} lacks {_line(exc.args[0])}, which mlx-lm needs for "
                f"{architecture}; {same}"
            )
        if odd := odd_settings(self.config):
            return self._refusal(
                f"config.json in {path} has {', '.join(odd)}, with which mlx-lm cannot build "
                f"{architecture}; {same}"
            )
        what = "cannot read the tensors of" if self.has_model else "cannot build"
        return self._refusal(
            f"mlx-lm {what} the {architecture} model in {path} ({_line(sentence_of(exc))}); {same}"
        )

    def _refusal(self, message: str, **details: Any) -> PackagingError:
        architecture = self.checkpoint.architecture
        return refusal(
            message, self.checkpoint.path, "build_model", architecture=architecture, **details
        )


def _without_wavelengths(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Without the wavelengths of rotary embeddings, which old versions of transformers saved too:
    they follow from the settings, and no class of mlx-lm reads them."""
    return {name: array for name, array in weights.items() if not name.endswith("_emb.inv_freq")}


def odd_settings(config: Mapping[str, Any]) -> list[str]:
    """Settings that are not what mlx-lm's class for the architecture says, or no size, with their
    values; at most three."""
    from mlops.engine.mlx_lm import find_model_classes

    hints: dict[str, Any] = {"architectures": list[str] | str, "text_config": dict}
    try:
        hints |= typing.get_type_hints(find_model_classes(dict(config))[1])
    except Exception as exc:  # whoever asks has another error at hand, which is told
        logger.debug("no types of the settings: %s", exc)
    return [
        f"{name} {str(config[name])[:40]!r}"
        for name, hint in hints.items()
        if name in config
        and not (_is_of(config[name], hint) and (hint is not int or config[name] > 0))
    ][:3]


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a type; True for every type that JSON does not have."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_is_of(value, one) for one in typing.get_args(hint))
    kind = typing.get_origin(hint) or hint
    if kind is float:
        kind = int | float
    if kind not in (int, int | float, bool, str, list, dict, types.NoneType):
        return True
    return isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)


def _shape(array: mx.array) -> str:
    return "x".join(map(str, array.shape)) or "a single number"


def _dtype(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


def _line(text: object, length: int = 200) -> str:
    """A library's words on one line."""
    return " ".join(str(text).split())[:length]
