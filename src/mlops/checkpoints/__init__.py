"""Recognise and read what is on disk after training: whole, safe and what it claims to be.

Only names and headers are read; no weights are loaded and no framework is imported.

    recognition     what is at a path: asks the modules below, in turn
    language_model  config.json and model*.safetensors, as mlx-lm loads them
    adapters        LoRA and DoRA adapters of mlx-lm and PEFT; do they fit a base model
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
    TensorInfo,
)
from mlops.checkpoints.file_set import left_out, stored_files
from mlops.checkpoints.files import CheckpointFile, list_files
from mlops.checkpoints.pooling import Pooling, PoolingMode
from mlops.checkpoints.recognition import recognise
from mlops.checkpoints.safetensors import SafetensorsHeader, read_header

__all__ = [
    "AdapterInfo",
    "AdapterModule",
    "Checkpoint",
    "CheckpointFile",
    "CheckpointKind",
    "Pooling",
    "PoolingMode",
    "SafetensorsHeader",
    "TensorInfo",
    "adapter_delta_is_zero",
    "check_adapter_fits",
    "left_out",
    "list_files",
    "read_header",
    "recognise",
    "stored_files",
]
