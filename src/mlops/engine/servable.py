"""Whether a checkpoint can be loaded and served, found out without the values of its weights.

Packaging asks, so that what is packaged can be served: the model is built as loading builds it, its
tokenizer is read, one forward pass is laid out, and adapters are held against the layers that they
change. Nothing is computed; what only values show (`batching`'s trial, numbers that are not finite)
is left to loading.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from mlops.checkpoints import Checkpoint, CheckpointKind
from mlops.checkpoints.refusal import examples, printable, refusal
from mlops.engine.building import build_model, odd_settings
from mlops.engine.owner import run_in_owner
from mlops.errors import sentence_of

if TYPE_CHECKING:
    from mlx import nn


def check_loads(model: Checkpoint, *adapters: Checkpoint) -> list[str]:
    """Refuse a model, or adapters of it, that loading would refuse.

    Args:
        model: anything but an adapter; only language models are looked at.

    Returns:
        What its user should know, a sentence each.

    Raises:
        PackagingError: it cannot be loaded, whatever its weights are.
    """
    if model.kind is not CheckpointKind.LANGUAGE_MODEL:
        return []
    return [printable(warning) for warning in run_in_owner(_check_loads, model, adapters)]


def _check_loads(model: Checkpoint, adapters: tuple[Checkpoint, ...]) -> list[str]:
    from mlops.hardware import ensure_blas

    ensure_blas()  # before MLX is imported: whoever packages may serve afterwards
    try:
        importlib.import_module("mlops.engine.mlx_lm")
    except ImportError as exc:
        return [
            f"MLX cannot be imported here ({sentence_of(exc)}), so it was not checked that "
            f"{model.path} can be loaded: neither names and shapes of its tensors, nor its "
            f"tokenizer{', nor its adapters' if adapters else ''}"
        ]
    from mlops.engine.tokenization import check_adapter_tokenizer, load_tokenizer

    built, config = build_model(model)
    loaded = load_tokenizer(model) if model.has_tokenizer else None
    if loaded is None:
        warnings = [
            f"{model.path} has no tokenizer, so it cannot be served: put tokenizer.json and "
            "tokenizer_config.json beside its weights"
        ]
    else:
        warnings = [*loaded.warnings, *_check_tokens(model, loaded.tokenizer, config)]
    warnings += _check_forward_pass(model, built, config)
    if adapters:
        from mlops.engine.banks import AdapterBanks

        banks = AdapterBanks(built, model, "cpu")
        for adapter in adapters:
            banks.check(adapter)
            if loaded is not None:
                warnings += check_adapter_tokenizer(adapter, model, loaded.tokenizer)
    return warnings


def _check_tokens(model: Checkpoint, tokenizer: Any, config: dict[str, Any]) -> list[str]:
    """The tokens are rows of the embedding."""
    from mlops.engine.tokenization import vocabulary_size

    num_rows = vocabulary_size(config)
    if num_rows is None:
        return []
    added = set(tokenizer.get_added_vocab())
    beyond = {name: token for name, token in tokenizer.get_vocab().items() if token >= num_rows}
    if ordinary := sorted(beyond.keys() - added):
        raise refusal(
            f"the tokenizer of {model.path} has tokens that the model does not know, for its "
            f"embedding has {num_rows} rows: {examples(ordinary)}; use the tokenizer that was "
            "saved with the weights",
            model.path,
            "check_loads",
            tokens=ordinary[:10],
        )
    if not beyond:
        return []
    return [
        f"tokens were added to the tokenizer of {model.path} and not to the model "
        f"({examples(sorted(beyond))}): texts that contain them are refused"
    ]


def _check_forward_pass(model: Checkpoint, built: nn.Module, config: dict[str, Any]) -> list[str]:
    """Lay out a forward pass, so that every layer sees the shapes of the one before it."""
    if hasattr(sys.modules.get(type(built).__module__), "np"):
        return []  # it goes by values that it computes on the way (`dbrx`): that reads its weights
    from mlops.engine.witness import lay_out_forward_pass

    try:
        lay_out_forward_pass(built)
    except Exception as exc:
        if "No Metal back-end" in str(exc):
            return [
                f"mlx-lm computes with weights like those of {model.path} on Apple's GPU alone: "
                "they cannot be served on this machine"
            ]
        odd = ", ".join(odd_settings(config))
        reason = odd or " ".join(sentence_of(exc).split())[:200]
        raise refusal(
            f"mlx-lm's {model.architecture} cannot compute with the settings that config.json in "
            f"{model.path} has ({reason}); use the config.json that was saved with the weights",
            model.path,
            "check_loads",
            architecture=model.architecture,
        ) from exc
    return []
