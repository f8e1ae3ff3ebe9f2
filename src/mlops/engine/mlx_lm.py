"""What the engine uses of mlx-lm. Nothing else here imports that library: see `open_files`."""

from __future__ import annotations

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
    "load_model",
    "load_tokenizer",
    "make_prompt_cache",
]
