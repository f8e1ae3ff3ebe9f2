"""Runners: one loaded model each, behind the Protocol in `base`.

mlx      language models on MLX, with adapters; and the base class of custom runners
lora     an adapter with its base model
outputs  what a custom runner returned, as JSON types
"""

from mlops.serving.runner.base import Prediction, Runner
from mlops.serving.runner.lora import LoRAModelRunner
from mlops.serving.runner.mlx import MLXModelRunner

__all__ = ["LoRAModelRunner", "MLXModelRunner", "Prediction", "Runner"]
