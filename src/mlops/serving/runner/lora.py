"""The runner for a LoRA or DoRA adapter: its base model with the adapter in use by default."""

from __future__ import annotations

import logging
from typing import Any

from mlops.serving.runner.mlx import MLXModelRunner

logger = logging.getLogger(__name__)


class LoRAModelRunner(MLXModelRunner):
    """Serves an adapter over its base model, and the bare base to requests for `"base"`.

    The base is the one the adapter was packaged with, the one its config names, or `base_model=`.
    A folder with a full model, as a trainer leaves it that has merged its adapter, is served as it
    is. The arguments are those of `MLXModelRunner`.
    """

    def __init__(self, model_path: Any, *, model_type: str = "lora", **arguments: Any) -> None:
        super().__init__(model_path, model_type=model_type, **arguments)

    def _find_adapters(self, resolved: Any) -> Any:
        if not resolved.is_adapter:
            logger.info(
                "%s is %s, not an adapter; it is served as it is",
                self.model_path,
                resolved.checkpoint.description,
            )
        return super()._find_adapters(resolved)
