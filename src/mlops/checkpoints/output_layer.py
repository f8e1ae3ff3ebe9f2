"""Models whose output layer is their embedding, as they say, and that have one in the files.

It is a copy, as some trainers write it, or another: adapters were merged into one of the two, or
they were trained apart. transformers 5 computes with another; mlx-lm would drop it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mlops.checkpoints.checkpoint import TensorInfo
from mlops.checkpoints.tensor_values import have_same_bytes

_NAME = "lm_head.weight"


def own_output_layer(path: Path, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The name of the output layer's weight, where its values are not those of the embedding."""
    pair = _pair(tensors)
    return pair[0] if pair and not _are_alike(path, *(tensors[name] for name in pair)) else None


def has_copied_output_layer(path: Path, tensors: Mapping[str, TensorInfo]) -> bool:
    """True when the embedding lies there twice, once as the output layer."""
    pair = _pair(tensors)
    return pair is not None and _are_alike(path, *(tensors[name] for name in pair))


def _pair(tensors: Mapping[str, TensorInfo]) -> tuple[str, str] | None:
    """The names of the output layer's weight and of the embedding's, stored in the same way."""
    for output_layer, weight in tensors.items():
        if not output_layer.endswith(_NAME):
            continue
        prefix = output_layer.removesuffix(_NAME)
        for embedding in (f"{prefix}model.embed_tokens.weight", f"{prefix}embed_tokens.weight"):
            other = tensors.get(embedding)
            if other and (weight.dtype, weight.shape) == (other.dtype, other.shape):
                return output_layer, embedding
    return None


def _are_alike(path: Path, first: TensorInfo, second: TensorInfo) -> bool:
    return have_same_bytes(path / first.file, first, second, path / second.file)
