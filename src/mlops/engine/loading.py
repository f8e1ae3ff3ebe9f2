"""From checkpoints on disk to a model in memory, ready to generate.

    choose the device -> build the model -> lay out its weights -> tokenizer -> adapters -> batching

Everything here runs in the owner thread.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mlops.checkpoints import Checkpoint, CheckpointKind, recognise
from mlops.engine.adapters import ResidentAdapters
from mlops.engine.batching import can_batch
from mlops.engine.layout import lay_out
from mlops.engine.owner import check_stopping, run_in_owner
from mlops.errors import ServiceError

if TYPE_CHECKING:
    from mlx import nn

logger = logging.getLogger(__name__)

NO_ADAPTERS: Mapping[str, Checkpoint] = MappingProxyType({})


@dataclass
class LoadedModel:
    """A model in memory. Its arrays belong to the owner thread.

    Attributes:
        model: mlx-lm's model.
        tokenizer: mlx-lm's `TokenizerWrapper`.
        config: `config.json` as mlx-lm reads it.
        device: `"gpu"` or `"cpu"`.
        layout: how the weights are held, in words: "float32 (dequantized from 4-bit)".
        can_batch: whether several requests can share a forward pass.
    """

    checkpoint: Checkpoint
    model: nn.Module
    tokenizer: Any
    config: Mapping[str, Any]
    device: str
    layout: str
    adapters: ResidentAdapters
    can_batch: bool

    @property
    def architecture(self) -> str | None:
        """The `model_type` of mlx-lm."""
        return self.checkpoint.architecture

    @property
    def context_tokens(self) -> int | None:
        """The most tokens of prompt and answer together; None when the config does not say."""
        return self._find_integer("max_position_embeddings", "n_positions", "n_ctx")

    @property
    def vocabulary_size(self) -> int | None:
        """Rows of the embedding; None when the config does not say."""
        return self._find_integer("vocab_size")

    def _find_integer(self, *names: str) -> int | None:
        nested = self.config.get("text_config")
        for config in (self.config, nested if isinstance(nested, Mapping) else {}):
            for name in names:
                value = config.get(name)
                if isinstance(value, int) and value > 0:
                    return value
        return None


def load_model(
    path: str | Path | Checkpoint,
    *,
    adapters: Mapping[str, Checkpoint] = NO_ADAPTERS,
    enable_mps: bool = True,
    enable_unified_memory: bool = True,
    memory_budget_bytes: int | None = None,
) -> LoadedModel:
    """Load a language model and its adapters.

    Args:
        path: the model's folder, or what `recognise` said of it.
        adapters: by the name that requests use.
        enable_mps: compute on Metal (or CUDA) where there is one.
        enable_unified_memory: set MLX's memory limits for this machine.
        memory_budget_bytes: the most that weights may take when they are made float32 for a CPU;
            by default a share of the machine's memory.

    Raises:
        PackagingError: it is not a model or an adapter that can be used.
        ServiceError: mlx-lm cannot load it, or there is no tokenizer.
    """
    return run_in_owner(
        _load, path, adapters, enable_mps, enable_unified_memory, memory_budget_bytes
    )


def _load(
    path: str | Path | Checkpoint,
    adapters: Mapping[str, Checkpoint],
    enable_mps: bool,
    enable_unified_memory: bool,
    memory_budget_bytes: int | None,
) -> LoadedModel:
    from mlops.hardware import apply_memory_limits, ensure_blas, select_device

    checkpoint = path if isinstance(path, Checkpoint) else recognise(path)
    if checkpoint.kind is not CheckpointKind.LANGUAGE_MODEL:
        raise ServiceError(
            f"{checkpoint.path} is {checkpoint.description}; this version serves MLX and "
            "Transformers language models",
            "load_model",
            {"path": str(checkpoint.path), "kind": checkpoint.kind.value},
        )
    ensure_blas()
    device = select_device(enable_mps)
    apply_memory_limits(enable_unified_memory)
    check_stopping()
    model, config = _load_weights(checkpoint)
    check_stopping()
    layout = lay_out(model, checkpoint, device, memory_budget_bytes)
    check_stopping()
    loaded = LoadedModel(
        checkpoint=checkpoint,
        model=model,
        tokenizer=_load_tokenizer(checkpoint, config),
        config=config,
        device=device,
        layout=layout,
        adapters=ResidentAdapters(model, checkpoint),
        can_batch=_try_out(checkpoint, model),
    )
    for name, adapter in adapters.items():
        check_stopping()
        loaded.adapters.load(name, adapter)
    logger.info(
        "loaded %s on the %s: %s, %d adapters", checkpoint.path, device, layout, len(adapters)
    )
    return loaded


def _load_weights(checkpoint: Checkpoint) -> tuple[nn.Module, dict[str, Any]]:
    from mlx_lm.utils import load_model as load_mlx_model

    try:
        # Lazy: weights are read when they are laid out, one layer after the other.
        model, config = load_mlx_model(checkpoint.path, lazy=True, trust_remote_code=False)
    except Exception as exc:
        raise ServiceError(
            f"mlx-lm cannot load {checkpoint.path}: {exc}",
            "load_model",
            {"path": str(checkpoint.path), "architecture": checkpoint.architecture},
        ) from exc
    return model, config


def _load_tokenizer(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Any:
    from mlx_lm.utils import load_tokenizer

    details = {"path": str(checkpoint.path)}
    if not checkpoint.has_tokenizer:
        raise ServiceError(
            f"{checkpoint.path} has no tokenizer: put tokenizer.json and tokenizer_config.json "
            "beside its weights",
            "load_model",
            details,
        )
    try:
        return load_tokenizer(
            checkpoint.path,
            # False, not left out: transformers would ask on the terminal.
            {"trust_remote_code": False, "local_files_only": True},
            eos_token_ids=config.get("eos_token_id"),
        )
    except Exception as exc:
        raise ServiceError(
            f"the tokenizer of {checkpoint.path} cannot be loaded: {exc}", "load_model", details
        ) from exc


def _try_out(checkpoint: Checkpoint, model: nn.Module) -> bool:
    """Compute something with the model, before anybody asks; says whether it can batch."""
    try:
        is_batched = can_batch(model)
    except Exception as exc:
        raise ServiceError(
            f"{checkpoint.path} was loaded and cannot compute: {exc}",
            "load_model",
            {"path": str(checkpoint.path), "architecture": checkpoint.architecture},
        ) from exc
    if not is_batched:
        logger.warning(
            "mlx-lm cannot batch %s models like this one: requests run one after the other",
            checkpoint.architecture,
        )
    return is_batched
