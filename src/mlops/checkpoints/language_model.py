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
    TensorInfo,
    size_of_model,
)
from mlops.checkpoints.consistency import PLAIN_DECODERS, check_consistency
from mlops.checkpoints.files import CheckpointFile, read_json
from mlops.checkpoints.output_layer import own_output_layer
from mlops.checkpoints.pooling import read_pooling
from mlops.checkpoints.quantization import describe_quantization, read_quantization
from mlops.checkpoints.refusal import refusal
from mlops.checkpoints.settings import honour_settings, is_said_tied
from mlops.checkpoints.stand_ins import refuse_stand_ins, refuse_unfinished
from mlops.checkpoints.tensors import WeightShapes, read_tensors
from mlops.checkpoints.tokenizer_files import has_vocabulary
from mlops.checkpoints.weight_files import (
    check_against_index,
    choose_weight_files,
    refuse_rivals,
)
from mlops.counts import count

_MODEL_TYPE = re.compile(r"^[A-Za-z0-9_.-]{1,64}$")

_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel",
    "base_model.model.": "PEFT",
    "pretrained_model.": "TRL's model with a value head",
}
"""What trainers put around a model, by what the names of its tensors then begin with."""

_OTHER_HEADS = frozenset({"score", "classifier", "qa_outputs", "v_head", "value_head"})
"""What models that give no text have in place of an output layer, or beside it."""

_DTYPES = frozenset(
    {"BOOL", "U8", "U16", "U32", "U64", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "C64"}
    | {"F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2"}
)
"""What MLX reads, or is refused with the method of quantization that it is of."""

_OWN_OUTPUT_LAYER = (
    "{} has other values than the embedding, so it is computed with, as transformers does; to have "
    "that said, set tie_word_embeddings in config.json to false"
)


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
    _refuse_other_models(path, tensors)
    if not architectures.is_supported(config):
        needs_code = " (its own code, which auto_map names, would be needed and is never run)"
        raise refusal(
            f"the architecture {config['model_type']!r} of {path} is unknown to the installed "
            f"mlx-lm{needs_code if config.get('auto_map') else ''}; a newer mlx-lm may know it",
            path,
            architecture=config["model_type"],
        )
    quantization = read_quantization(path, config, tensors, files)
    is_headless = config["model_type"] in PLAIN_DECODERS and "embed_tokens.weight" in tensors
    if is_headless:
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    check_consistency(
        path, {**config, "tie_word_embeddings": True} if is_headless else config, tensors
    )

    untied = own_output_layer(path, tensors) if is_said_tied(config) else None
    told = {**quantization.model_config, **({"tie_word_embeddings": False} if untied else {})}
    honoured = honour_settings(path, {**config, **told}, tensors)
    is_mlx = metadata.get("format") == "mlx" or isinstance(config.get("quantization"), dict)
    num_parameters = WeightShapes(tensors, config).num_parameters()
    has_tokenizer = has_vocabulary(files)
    return Checkpoint(
        path=path,
        kind=CheckpointKind.LANGUAGE_MODEL,
        format="mlx" if is_mlx else "transformers",
        framework="mlx" if is_mlx else "transformers",
        description=_describe(
            config, quantization.summary, num_parameters, weight_files, has_tokenizer
        ),
        weight_files=weights.names,
        weight_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        architecture=config["model_type"],
        quantization=quantization.summary,
        num_parameters=num_parameters,
        dtypes=tuple(sorted({tensor.dtype for tensor in tensors.values()})),
        tensors=tensors,
        has_tokenizer=has_tokenizer,
        config=config,
        pooling=read_pooling(config, files),
        is_headless=is_headless,
        files=weights.with_index,
        model_config={**told, **honoured.model_config},
        ropes=honoured.ropes,
        warnings=(
            *([_OWN_OUTPUT_LAYER.format(untied)] if untied else []),
            *weights.warnings,
            *quantization.warnings,
            *honoured.warnings,
        ),
    )


def _refuse_other_models(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse by name what is no language model, or has something around it."""
    for name, tensor in tensors.items():
        if wrapper := next((at for at in _WRAPPERS if name.startswith(at)), None):
            raise refusal(
                f"the tensors in {path} are named as {_WRAPPERS[wrapper]} has them ({name[:80]}): "
                "save the model inside it, without what is around",
                path,
                tensor=name,
            )
        if name.partition(".")[0] in _OTHER_HEADS:
            raise refusal(
                f"{path} gives scores, not text: it has {name[:80]}, which belongs to a classifier "
                "or a reward model; models like that are not served",
                path,
                tensor=name,
            )
        if tensor.dtype not in _DTYPES:
            raise refusal(
                f"{name[:80]} in {path} is stored as {tensor.dtype}, which MLX does not read; save "
                "the model again in bfloat16 or float32",
                path,
                tensor=name,
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
    return _llama4(config) if config["model_type"] == "llama4_text" else config


def _llama4(config: dict[str, Any]) -> dict[str, Any]:
    """The text model of Llama 4, saved on its own: mlx-lm's `llama4_text` has no experts, and its
    `llama4`, around a text model, has them."""
    has_experts = config.get("num_local_experts") and config.get("interleave_moe_layer_step") != 0
    if not has_experts or config.get("moe_layers") == []:
        return config
    return {**config, "model_type": "llama4", "text_config": config}


def _describe(
    config: Mapping[str, Any],
    quantization: Mapping[str, Any] | None,
    num_parameters: int,
    weight_files: list[CheckpointFile],
    has_tokenizer: bool,
) -> str:
    words = describe_quantization(quantization)
    prefix = f"{words} quantized " if words else ""
    article = "an" if (prefix or config["model_type"])[0] in "aeiou8" else "a"
    parts = [
        f"{article} {prefix}{config['model_type']} language model",
        f"{size_of_model(num_parameters)} parameters",
        count(len(weight_files), "weight file"),
        "tokenizer included" if has_tokenizer else "no tokenizer",
    ]
    return ", ".join(parts)
