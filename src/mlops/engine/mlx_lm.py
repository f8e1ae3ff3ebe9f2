"""What the engine uses of mlx-lm. Nothing else here imports that library: see `open_files`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mlops.hardware.open_files import open_file_limit_kept

with open_file_limit_kept():
    from mlx_lm.models.base import create_causal_mask
    from mlx_lm.models.cache import (
        BatchKVCache,
        CacheList,
        KVCache,
        RotatingKVCache,
        make_prompt_cache,
    )
    from mlx_lm.models.switch_layers import (
        QuantizedSwitchLinear,
        SwiGLU,
        SwitchGLU,
        SwitchLinear,
        SwitchMLP,
    )
    from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, SPMStreamingDetokenizer
    from mlx_lm.tokenizer_utils import _infer_tool_parser as infer_tool_parser
    from mlx_lm.utils import _get_classes as find_model_classes
    from mlx_lm.utils import load_model, load_tokenizer

__all__ = [
    "BPEStreamingDetokenizer",
    "BatchKVCache",
    "CacheList",
    "KVCache",
    "QuantizedSwitchLinear",
    "RotatingKVCache",
    "SPMStreamingDetokenizer",
    "SwiGLU",
    "SwitchGLU",
    "SwitchLinear",
    "SwitchMLP",
    "create_causal_mask",
    "find_model_classes",
    "find_tool_parser",
    "infer_tool_parser",
    "load_model",
    "load_tokenizer",
    "make_prompt_cache",
]


def find_tool_parser(name: str) -> Any:
    """The module of mlx-lm that reads calls of this form, which `infer_tool_parser` has named."""
    return import_module(f"mlx_lm.tool_parsers.{name}")
