"""Recognise and read what is on disk after training: whole, safe and what it claims to be.

Only names and headers are read; no weights are loaded and no framework is imported.

    recognition     what is at a path: asks the modules below, in turn
    language_model  config.json and model*.safetensors, as mlx-lm loads them
    adapters        LoRA and DoRA adapters of mlx-lm and PEFT; do they fit a base model
    placement       where in a model the tensors of an adapter go
    expert_adapters adapters of a mixture's experts, in each form that they have
    other_formats   PyTorch, ONNX, Core ML and MLX function files
    consistency     does config.json describe these tensors
    architectures   which architectures the installed mlx-lm has
    pooling         how a model made for embeddings gives them
    tensors         all tensors of a checkpoint, and their shapes when quantized
    safetensors     the header of one file
    files           which files a folder holds; links, globs, bounded JSON
    hub             models from the Hugging Face Hub
    checkpoint      the records that all of these return
    refusal         the error that all of these raise
"""

from __future__ import annotations

from mlops.checkpoints.adapters import adapter_delta_is_zero, check_adapter_fits
from mlops.checkpoints.checkpoint import (
    AdapterInfo,
    AdapterModule,
    Checkpoint,
    CheckpointKind,
    Part,
    TensorInfo,
    Update,
)
from mlops.checkpoints.expert_adapters import ExpertLinear, ExpertLinears
from mlops.checkpoints.files import CheckpointFile, list_files
from mlops.checkpoints.placement import BaseModules, place
from mlops.checkpoints.pooling import Pooling, PoolingMode
from mlops.checkpoints.recognition import recognise
from mlops.checkpoints.safetensors import SafetensorsHeader, read_header

__all__ = [
    "AdapterInfo",
    "AdapterModule",
    "BaseModules",
    "Checkpoint",
    "CheckpointFile",
    "CheckpointKind",
    "ExpertLinear",
    "ExpertLinears",
    "Part",
    "Pooling",
    "PoolingMode",
    "SafetensorsHeader",
    "TensorInfo",
    "Update",
    "adapter_delta_is_zero",
    "check_adapter_fits",
    "list_files",
    "place",
    "read_header",
    "recognise",
]
