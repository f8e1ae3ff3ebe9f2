"""A language model folder: `config.json`, `model*.safetensors`, a tokenizer beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlops.checkpoints import architectures
from mlops.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointKind,
    size_of_model,
)
from mlops.checkpoints.consistency import PLAIN_DECODERS, check_consistency
from mlops.checkpoints.files import CheckpointFile, read_json
from mlops.checkpoints.pooling import read_pooling
from mlops.checkpoints.refusal import refusal
from mlops.checkpoints.stand_ins import refuse_stand_ins, refuse_unfinished
from mlops.checkpoints.tensors import WeightShapes, read_tensors
from mlops.checkpoints.weight_files import (
    check_against_index,
    choose_weight_files,
    refuse_rivals,
)
from mlops.counts import count

_MODEL_TYPE = re.compile(r"^[A-Za-z0-9_.-]{1,64}$")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json")


def recognise_language_model(path: Path, files: Mapping[str, CheckpointFile]) -> Checkpoint:
    """Recognise a folder that holds `*.safetensors`.

    Args:
        files: of the folder, by relative path.

    Raises:
        PackagingError: it is incomplete, contradicts itself or is no model that mlx-lm can load.
    """
    config = _read_config(path, files)
    weights = choose_weight_files(path, files)
    refuse_unfinished(path, files, set(weights.with_index))
    weight_files = [files[name] for name in weights.names]
    refuse_stand_ins(path, weight_files)
    tensors, metadata = read_tensors(path, weight_files)
    if not tensors:
        raise refusal(f"the weight files in {path} hold no tensors", path)
    check_against_index(path, weights, tensors)
    refuse_rivals(path, files, weights, tensors)
    if not architectures.is_supported(config):
        raise refusal(
            f"the architecture {config['model_type']!r} of {path} is unknown to the installed "
            "mlx-lm; a newer mlx-lm may know it",
            path,
            architecture=config["model_type"],
        )
    is_headless = config["model_type"] in PLAIN_DECODERS and "embed_tokens.weight" in tensors
    if is_headless:
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    check_consistency(
        path, {**config, "tie_word_embeddings": True} if is_headless else config, tensors
    )

    quantization = _quantization(config)
    is_mlx = metadata.get("format") == "mlx" or isinstance(config.get("quantization"), dict)
    num_parameters = WeightShapes(tensors, config).num_parameters()
    has_tokenizer = any(name in files for name in TOKENIZERS) or any(
        name.endswith(".tiktoken") and "/" not in name for name in files
    )
    return Checkpoint(
        path=path,
        kind=CheckpointKind.LANGUAGE_MODEL,
        format="mlx" if is_mlx else "transformers",
        framework="mlx" if is_mlx else "transformers",
        description=_describe(config, quantization, num_parameters, weight_files, has_tokenizer),
        weight_files=weights.names,
        weight_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        architecture=config["model_type"],
        quantization=quantization,
        num_parameters=num_parameters,
        dtypes=tuple(sorted({tensor.dtype for tensor in tensors.values()})),
        tensors=tensors,
        has_tokenizer=has_tokenizer,
        config=config,
        pooling=read_pooling(config, files),
        is_headless=is_headless,
        files=weights.with_index,
        warnings=weights.warnings,
    )


def _read_config(path: Path, files: Mapping[str, CheckpointFile]) -> dict[str, Any]:
    if "config.json" not in files:
        raise refusal(
            f"{path} has weights but no config.json; add the one of the model they belong to", path
        )
    config = read_json(files["config.json"])
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not _MODEL_TYPE.match(model_type):
        raise refusal(
            f"config.json in {path} does not say the architecture: its model_type is "
            f"{str(model_type)[:80]!r}",
            path,
            file="config.json",
        )
    return config


def _quantization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    for key in ("quantization", "quantization_config"):
        settings = config.get(key)
        if isinstance(settings, dict):
            method = settings.get("mode", settings.get("quant_method", "affine"))
            return {
                "bits": settings.get("bits"),
                "group_size": settings.get("group_size"),
                "mode": method,
            }
    return None


def _describe(
    config: Mapping[str, Any],
    quantization: Mapping[str, Any] | None,
    num_parameters: int,
    weight_files: list[CheckpointFile],
    has_tokenizer: bool,
) -> str:
    prefix = ""
    if quantization is not None:
        bits = quantization["bits"]
        prefix = f"{bits}-bit quantized " if isinstance(bits, int) else "quantized "
    article = "an" if (prefix or config["model_type"])[0] in "aeiou8" else "a"
    parts = [
        f"{article} {prefix}{config['model_type']} language model",
        f"{size_of_model(num_parameters)} parameters",
        count(len(weight_files), "weight file"),
        "tokenizer included" if has_tokenizer else "no tokenizer",
    ]
    return ", ".join(parts)
