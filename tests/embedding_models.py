"""Tiny models made for embeddings, with the files that sentence-transformers writes, and what
mlx-lm's layers give for the same tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import tiny_models
from mlops import engine


def write_embedding_model(
    folder: str | Path,
    *,
    mode: str = "lasttoken",
    is_normalized: bool = True,
    is_headless: bool = True,
    kinds: Sequence[str] | None = None,
    **arguments: Any,
) -> Path:
    """Write a model with random weights; returns its folder.

    Args:
        mode: of pooling, as sentence-transformers calls it.
        is_headless: tensors are named as in Qwen3-Embedding, without `model.` and output layer.
        kinds: of the modules, where they are not the usual ones.
        arguments: of `write_language_model`.
    """
    folder = tiny_models.write_language_model(
        folder, **{"architecture": "qwen3", "tie_word_embeddings": True, **arguments}
    )
    kinds = kinds or ["Transformer", "Pooling", *(["Normalize"] if is_normalized else [])]
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": f"{number}_{kind}" if number else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    flags = {"cls": "cls_token", "mean": "mean_tokens"}
    pooling = {"word_embedding_dimension": 32} | {
        f"pooling_mode_{flags.get(one, one)}": one == mode
        for one in ("cls", "mean", "max_tokens", "weightedmean_tokens", "lasttoken", mode)
    }
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if is_headless:
        engine.run_in_owner(_behead, folder)
    return folder


def lone_vector(model: Any, tokens: Sequence[int], mode: str, is_normalized: bool) -> NDArray[Any]:
    """What the layers of mlx-lm's model give for one text, alone, pooled with NumPy."""

    def states() -> NDArray[Any]:
        import mlx.core as mx

        return np.array(model.model(mx.array([list(tokens)])).astype(mx.float32))[0]

    of_tokens = engine.run_in_owner(states).astype(np.float64)
    vector = {"lasttoken": of_tokens[-1], "cls": of_tokens[0], "mean": of_tokens.mean(axis=0)}[mode]
    return vector / np.linalg.norm(vector) if is_normalized else vector


def _behead(folder: Path) -> None:
    import mlx.core as mx

    file = folder / "model.safetensors"
    weights = {
        name.removeprefix("model."): array
        for name, array in dict(mx.load(str(file))).items()
        if name.startswith("model.")
    }
    mx.eval(weights)
    mx.save_safetensors(str(file), weights, metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(weights, file.name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
