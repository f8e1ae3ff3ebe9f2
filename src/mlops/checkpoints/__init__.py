"""Recognise and read what is on disk after training: whole, safe and what it claims to be.

Only names and headers are read; no weights are loaded and no framework is imported.

    recognition     what is at a path: asks the modules below, in turn
    language_model  config.json and model*.safetensors, as mlx-lm loads them
    adapters        LoRA and DoRA adapters of mlx-lm and PEFT
    adapter_fit     do they fit a base model
    adapter_names   what the base model calls a module, whoever wrote its name
    adapter_values  do they change anything, and are their values finite
    tensor_values   what bytes show: all zeros, NaN, copies
    placement       where in a model the tensors of an adapter go
    expert_adapters adapters of a mixture's experts, in each form that they have
    peft_config     what PEFT's configuration says of an adapter
    peft_patterns   its regular expressions
    other_formats   PyTorch, ONNX, Core ML and MLX function files
    consistency     does config.json describe these tensors
    settings        does mlx-lm compute what config.json says; asks the eight below
      language_settings  those of the text part, and what both libraries know of them
      library_sources    what mlx-lm and transformers read, by their sources
      setting_values     values that are not possible
      translation        what mlx-lm is told of settings with another name, or none
      attention_windows  layers with a sliding window
      rope               rotary embeddings, in all their spellings
      rope_settings      what mlx-lm is told of them, and what is left to the engine
      uncomputed         settings that mlx-lm does not compute
    quantization    how weights are quantized, and whether mlx-lm computes with them
    architectures   which architectures the installed mlx-lm has
    pooling         how a model made for embeddings gives them
    tensors         all tensors of a checkpoint, and their shapes when quantized
    safetensors     the header of one file
    tokenizer_files which files of a folder are its tokenizer's
    files           which files a folder holds; links, globs, bounded JSON
    hub             models from the Hugging Face Hub
    checkpoint      the records that all of these return
    refusal         the error that all of these raise
"""

from __future__ import annotations

from mlops.checkpoints.adapter_fit import check_adapter_fits, check_copies, updates_in_base
from mlops.checkpoints.adapter_names import ModuleNames
from mlops.checkpoints.adapter_values import adapter_delta_is_zero, check_finite
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
from mlops.checkpoints.file_set import left_out, stored_files
from mlops.checkpoints.files import CheckpointFile, list_files
from mlops.checkpoints.placement import BaseModules
from mlops.checkpoints.pooling import Pooling, PoolingMode
from mlops.checkpoints.quantization import describe_quantization
from mlops.checkpoints.recognition import recognise
from mlops.checkpoints.safetensors import SafetensorsHeader, read_header
from mlops.checkpoints.tokenizer_files import TokenizerFiles, find_tokenizer_files

__all__ = [
    "AdapterInfo",
    "AdapterModule",
    "BaseModules",
    "Checkpoint",
    "CheckpointFile",
    "CheckpointKind",
    "ExpertLinear",
    "ExpertLinears",
    "ModuleNames",
    "Part",
    "Pooling",
    "PoolingMode",
    "SafetensorsHeader",
    "TensorInfo",
    "TokenizerFiles",
    "Update",
    "adapter_delta_is_zero",
    "check_adapter_fits",
    "check_copies",
    "check_finite",
    "describe_quantization",
    "find_tokenizer_files",
    "left_out",
    "list_files",
    "read_header",
    "recognise",
    "stored_files",
    "updates_in_base",
]
