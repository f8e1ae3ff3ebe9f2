"""The guide's address of the runners."""

from mlops.serving.runner.lora import LoRAModelRunner
from mlops.serving.runner.mlx import MLXModelRunner

__all__ = ["LoRAModelRunner", "MLXModelRunner"]
