"""How a language model gives embeddings: the files of sentence-transformers beside its weights.

    modules.json            the steps after the model: Pooling, and Normalize where there is one
    1_Pooling/config.json   which of the tokens' states become the vector

Their format is that of `SentenceTransformer.save`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from mlops.checkpoints.files import CheckpointFile, read_json, read_json_list
from mlops.errors import PackagingError

MODULES = "modules.json"
MAX_MODULES = 16
_STEP_FILES = ("config.json", "model.safetensors")


class PoolingMode(StrEnum):
    """Which states become the vector; the values are sentence-transformers' names."""

    LAST = "lasttoken"
    MEAN = "mean"
    FIRST = "cls"


@dataclass(frozen=True)
class Pooling:
    """From the states of a text's tokens to its vector.

    Attributes:
        is_normalized: the vector is divided by its length.
        dimensions: the lengths that the model was trained to be cut to; empty when nothing is said.
        problem: why this checkpoint cannot give embeddings here; "" when it can.
    """

    mode: PoolingMode = PoolingMode.LAST
    is_normalized: bool = False
    dimensions: tuple[int, ...] = ()
    problem: str = ""


def read_pooling(config: Mapping[str, Any], files: Mapping[str, CheckpointFile]) -> Pooling | None:
    """What the files say; None when the checkpoint is not made for embeddings.

    Args:
        config: content of `config.json`.
        files: of the folder, by relative path.
    """
    if MODULES not in files:
        return None
    try:
        return _read(config, files)
    except PackagingError as exc:  # a language model all the same
        return Pooling(problem=exc.message)


def pooling_files(files: Mapping[str, CheckpointFile]) -> list[str]:
    """Names of the files in the folders of the steps that `modules.json` names."""
    if MODULES not in files:
        return []
    try:
        modules = read_json_list(files[MODULES])[:MAX_MODULES]
    except PackagingError:  # a language model all the same
        return []
    folders = [
        str(module["path"]) for module in modules if isinstance(module, dict) and "path" in module
    ]
    wanted = {f"{folder}/{name}" for folder in folders if folder for name in _STEP_FILES}
    return [name for name in files if name in wanted]


def _read(config: Mapping[str, Any], files: Mapping[str, CheckpointFile]) -> Pooling:
    if config.get("is_causal") is False or config.get("use_bidirectional_attention"):
        return Pooling(problem="its attention looks in both directions, which mlx-lm does not do")
    modules = read_json_list(files[MODULES])[:MAX_MODULES]
    steps = [(_kind(module), module) for module in modules if isinstance(module, dict)]
    kinds = [kind for kind, _ in steps]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        return Pooling(
            problem=f"{MODULES} asks for {', '.join(kinds)[:200] or 'nothing'}; known is "
            "Transformer, Pooling and Normalize, in this order"
        )
    name = f"{steps[1][1].get('path')}/config.json"
    if name not in files:
        return Pooling(problem=f"{name[:200]} is missing, which says how to pool")
    modes = _modes(read_json(files[name]))
    if len(modes) != 1 or modes[0] not in set(PoolingMode):
        return Pooling(
            problem=f"{name} asks for {' and '.join(modes)[:200] or 'no'} pooling; known is one of "
            f"{', '.join(PoolingMode)}"
        )
    lengths = config.get("matryoshka_dimensions")
    return Pooling(
        PoolingMode(modes[0]),
        is_normalized="Normalize" in kinds,
        dimensions=tuple(
            length
            for length in (lengths if isinstance(lengths, list) else ())
            if type(length) is int
        ),
    )


def _kind(module: Mapping[str, Any]) -> str:
    """The class of a module, without the package, which differs between versions."""
    return str(module.get("type")).rpartition(".")[2]


def _modes(config: Mapping[str, Any]) -> list[str]:
    """The names of all modes that are on: a text, or one flag each."""
    named = config.get("pooling_mode")
    if named is not None:
        return [str(one) for one in (named if isinstance(named, list) else [named])]
    names = {"cls_token": "cls", "mean_tokens": "mean"}
    flags = (
        key.removeprefix("pooling_mode_")
        for key, value in config.items()
        if key.startswith("pooling_mode_") and value
    )
    return [names.get(flag, flag) for flag in flags]
