"""From checkpoints on disk to a model in memory, ready to generate.

    choose the device -> build the model -> lay out its weights -> tokenizer -> try it out

Everything here runs in the owner thread.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlops.checkpoints import Checkpoint, CheckpointKind, recognise
from mlops.checkpoints.checkpoint import CONTEXT_TOKENS
from mlops.engine.batching import Trial, try_out
from mlops.engine.finite import suspicious_settings
from mlops.engine.guidance import Guidance
from mlops.engine.layout import lay_out
from mlops.engine.owner import check_stopping, run_in_owner
from mlops.engine.token_bound import TokenBound
from mlops.engine.tokenization import find_integer, load_tokenizer, vocabulary_size
from mlops.errors import PackagingError, ServiceError

if TYPE_CHECKING:
    from mlx import nn

    from mlops.engine.banks import AdapterBanks
    from mlops.engine.pooling import Pooler

logger = logging.getLogger(__name__)


@dataclass
class LoadedModel:
    """A model in memory. Its arrays belong to the owner thread.

    Attributes:
        model: mlx-lm's model.
        tokenizer: mlx-lm's `TokenizerWrapper`.
        config: `config.json` as mlx-lm reads it.
        device: `"gpu"` or `"cpu"`.
        layout: how the weights are held, in words: "float32 (dequantized from 4-bit)".
        banks: where its adapters' tensors are.
        trial: what it showed when it computed for the first time.
        pooler: computes embeddings; None where the model gives none, and `no_embeddings` says why.
        digest: of the files; None when nobody has computed it.
    """

    checkpoint: Checkpoint
    model: nn.Module
    tokenizer: Any
    config: Mapping[str, Any]
    device: str
    layout: str
    banks: AdapterBanks
    trial: Trial
    digest: str | None = None
    pooler: Pooler | None = None
    no_embeddings: str = ""

    @cached_property
    def guidance(self) -> Guidance:
        """The grammars that its answers may have to follow."""
        return Guidance(self.tokenizer)

    @cached_property
    def token_bound(self) -> TokenBound:
        """What tells that a text cannot fit, without tokenizing it."""
        return TokenBound(self.tokenizer)

    @property
    def can_batch(self) -> bool:
        """Whether several requests can share a forward pass."""
        return self.trial.can_batch

    @property
    def architecture(self) -> str | None:
        """The `model_type` of mlx-lm."""
        return self.checkpoint.architecture

    @property
    def context_tokens(self) -> int | None:
        """The most tokens of prompt and answer together; None when the config does not say."""
        return find_integer(
            self.config, CONTEXT_TOKENS, "max_position_embeddings", "n_positions", "n_ctx"
        )

    @property
    def vocabulary_size(self) -> int | None:
        """Rows of the embedding; None when the config does not say."""
        return vocabulary_size(self.config)

    def with_tokenizer(self, tokenizer: Any) -> LoadedModel:
        """The same model, for requests that are written with another tokenizer.

        Args:
            tokenizer: mlx-lm's `TokenizerWrapper`.
        """
        return replace(self, tokenizer=tokenizer)


def load_model(
    path: str | Path | Checkpoint,
    *,
    enable_mps: bool = True,
    enable_unified_memory: bool = True,
    memory_budget_bytes: int | None = None,
    digest: str | None = None,
) -> LoadedModel:
    """Load a language model.

    Args:
        path: the model's folder, or what `recognise` said of it.
        enable_mps: compute on Metal (or CUDA) where there is one.
        enable_unified_memory: set MLX's memory limits for this machine.
        memory_budget_bytes: the most that weights may take when they are made float32 for a CPU;
            by default a share of the machine's memory.
        digest: of the files, where it is known; kept beside the model.

    Raises:
        PackagingError: there is nothing at `path` that can be read.
        ServiceError: mlx-lm cannot load it, or there is no tokenizer.
    """
    return run_in_owner(_load, path, enable_mps, enable_unified_memory, memory_budget_bytes, digest)


def _load(
    path: str | Path | Checkpoint,
    enable_mps: bool,
    enable_unified_memory: bool,
    memory_budget_bytes: int | None,
    digest: str | None,
) -> LoadedModel:
    from mlops.engine.banks import AdapterBanks
    from mlops.hardware import apply_memory_limits, ensure_blas, select_device

    checkpoint = path if isinstance(path, Checkpoint) else recognise(path)
    if checkpoint.kind is not CheckpointKind.LANGUAGE_MODEL:
        raise ServiceError(
            f"{checkpoint.path} is {checkpoint.description}; this version serves MLX and "
            "Transformers language models",
            "load_model",
            {"path": str(checkpoint.path), "kind": checkpoint.kind.value},
        )
    for warning in checkpoint.warnings:
        logger.warning("%s: %s", checkpoint.path, warning)
    ensure_blas()
    device = select_device(enable_mps)
    apply_memory_limits(enable_unified_memory, memory_budget_bytes)
    check_stopping()
    model, config = _load_weights(checkpoint)
    check_stopping()
    layout = lay_out(model, checkpoint, device, memory_budget_bytes)
    if device == "cpu" and layout.startswith("float32"):
        from mlops.engine.cpu import use_cpu_layers

        use_cpu_layers(model)
    check_stopping()
    trial = _try_out(checkpoint, model, config)
    pooler, no_embeddings = _try_pooling(checkpoint, model)
    loaded = LoadedModel(
        checkpoint=checkpoint,
        model=model,
        tokenizer=_load_tokenizer(checkpoint),
        config=config,
        device=device,
        layout=layout,
        banks=AdapterBanks(model, checkpoint, device),
        trial=trial,
        digest=digest,
        pooler=pooler,
        no_embeddings=no_embeddings,
    )
    logger.info("loaded %s on the %s: %s", checkpoint.path, device, layout)
    return loaded


def _load_weights(checkpoint: Checkpoint) -> tuple[nn.Module, dict[str, Any]]:
    """Lazy: weights are read when they are laid out, one layer after the other."""
    from mlops.engine.building import build_model

    try:
        return build_model(checkpoint)
    except PackagingError as exc:
        raise ServiceError(exc.message, "load_model", exc.details) from exc


def _load_tokenizer(checkpoint: Checkpoint) -> Any:
    try:
        loaded = load_tokenizer(checkpoint)
    except PackagingError as exc:
        raise ServiceError(exc.message, "load_model", exc.details) from exc
    for warning in loaded.warnings:
        logger.warning("%s", warning)
    return loaded.tokenizer


def _try_pooling(checkpoint: Checkpoint, model: nn.Module) -> tuple[Pooler | None, str]:
    from mlops.engine.pooling import try_pooling  # imports MLX: not before its BLAS is there

    return try_pooling(checkpoint, model)


def _try_out(checkpoint: Checkpoint, model: nn.Module, config: Mapping[str, Any]) -> Trial:
    """Compute something with the model, before anybody asks."""
    try:
        trial = try_out(model)
    except Exception as exc:
        suspicious = suspicious_settings(config) if isinstance(exc, ArithmeticError) else []
        hint = f" (look at its config.json: {', '.join(suspicious[:5])})" if suspicious else ""
        raise ServiceError(
            f"{checkpoint.path} was loaded and cannot compute: {exc}{hint}",
            "load_model",
            {"path": str(checkpoint.path), "architecture": checkpoint.architecture},
        ) from exc
    if not trial.can_batch:
        logger.warning(
            "mlx-lm cannot batch %s models like this one: requests run one after the other",
            checkpoint.architecture,
        )
    elif not trial.can_prefill_together:
        logger.info(
            "mlx-lm cannot compute prompts of different lengths together for %s models like this "
            "one: prompts are computed one by one, answers together",
            checkpoint.architecture,
        )
    return trial
