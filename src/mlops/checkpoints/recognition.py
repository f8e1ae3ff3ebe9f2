"""Say what is at a path, from file names and headers; no weights are read and nothing is run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from mlops.checkpoints.adapters import MLX_LM_WEIGHTS, PEFT_WEIGHTS, recognise_adapter
from mlops.checkpoints.checkpoint import Checkpoint
from mlops.checkpoints.file_set import companions, of_another_library, summary
from mlops.checkpoints.files import (
    PICKLE_SUFFIXES,
    CheckpointFile,
    Folder,
    matches_any,
    read_json,
)
from mlops.checkpoints.language_model import recognise_language_model
from mlops.checkpoints.other_formats import FORMATS, recognise_other
from mlops.checkpoints.peft_config import CONFIG
from mlops.checkpoints.refusal import examples, printable, refusal
from mlops.checkpoints.stand_ins import refuse_stand_ins, refuse_unfinished, unfinished
from mlops.checkpoints.tokenizer_files import VOCABULARIES
from mlops.hardware.home import expand

_STEP = re.compile(r"^checkpoint[-_](\d{1,12})$")
_STATES = (
    "training_args.*", "optimizer*", "scheduler*", "rng_state*", "random_states*", "scaler*",
)  # fmt: skip
"""Pickles of trainers that hold no weights."""


def recognise(path: str | Path) -> Checkpoint:
    """Recognise a folder (or a single file of another library) and check that it is whole.

    1. find the names of all files; one that is looked at later must be a regular file in there;
    2. nothing that goes with weights is a placeholder, and nothing asks for code to be run
       (what `auto_map` names is passed over, with a warning);
    3. an adapter, a language model or a model of another library, each checked by its own module;
    4. which files it consists of, and what is left out.

    Raises:
        PackagingError: nothing is there, or it is refused; the message says why, `details` has
            `path` and what is wrong.
        MissingDependencyError: mlx-lm is not installed.
    """
    path = Path(os.path.abspath(expand(path)))  # noqa: PTH100 - links in it stay
    if not os.path.exists(path):  # noqa: PTH110 - unlike Path.exists it never raises
        raise refusal(f"{path} does not exist: give the folder that holds the model", path)
    if not path.is_dir() and path.suffix.lower() not in set(FORMATS) - {".mlpackage"}:
        raise _refuse_file(path)
    files = Folder(path)
    checkpoint, others = _recognise(path, files)
    chosen = {*checkpoint.files, *others}
    beside = summary(name for name in files if name not in chosen)
    return replace(checkpoint, files=tuple(sorted(chosen)), left_out=beside)


def _recognise(path: Path, files: Folder) -> tuple[Checkpoint, Iterable[str]]:
    """What is there, and the names of further files that belong to it."""
    safetensors = [name for name in files.at_top() if name.endswith(".safetensors")]
    has_adapter = any(name in files for name in (CONFIG, MLX_LM_WEIGHTS, PEFT_WEIGHTS))
    has_model = any(name.startswith("model") for name in safetensors)
    if has_adapter and has_model:
        raise refusal(f"{path} holds both a model and an adapter; give each its own folder", path)
    is_adapter = has_adapter and bool(safetensors or not _pickles(files))
    if not is_adapter and not safetensors:
        others = of_another_library(files)
        models = [name for name in others if PurePosixPath(name).suffix.lower() in FORMATS]
        refuse_unfinished(path, files, set(models))
        refuse_stand_ins(path, [others[name] for name in models])
        checkpoint = recognise_other(path, others)
        if checkpoint is None:
            raise _refuse_without_weights(path, files)
        return checkpoint, others
    beside = companions(files)
    weights = [MLX_LM_WEIGHTS, PEFT_WEIGHTS] if is_adapter else []
    refuse_unfinished(path, files, {*beside, *weights, *VOCABULARIES, "config.json"})
    refuse_stand_ins(path, [files[name] for name in (*beside, *weights) if name in files])
    _refuse_code(path, files)
    found = (recognise_adapter if is_adapter else recognise_language_model)(path, files)
    warnings = (*found.warnings, *_warn_of_code(files))
    checkpoint = replace(found, warnings=tuple(map(printable, warnings)))
    return checkpoint, (*beside, *checkpoint.weight_files)


def _refuse_file(path: Path) -> Exception:
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return _refuse_pickle(path, path.name)
    return refusal(
        f"{path} is a file: give the folder that holds the model, or a single "
        f"{', '.join(sorted(FORMATS))}",
        path,
    )


def _refuse_pickle(path: Path, name: str) -> Exception:
    return refusal(
        f"the weights in {name} are a pickle, which can run code when it is opened; convert them "
        "to safetensors",
        path,
        file=name,
    )


def _refuse_code(path: Path, files: Mapping[str, CheckpointFile]) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        if name in files and read_json(files[name]).get("model_file"):
            raise refusal(
                f"{name} in {path} asks for the model's own Python code (model_file), which is "
                "never run; remove that key if the model works without",
                path,
                file=name,
                key="model_file",
            )


def _warn_of_code(files: Mapping[str, CheckpointFile]) -> tuple[str, ...]:
    """Transformers' way to name a checkpoint's own code. mlx-lm has code of its own for the model,
    and a tokenizer that needs it is refused when it is read."""
    return tuple(
        f"{name} names Python code of the checkpoint's own (auto_map), which is never run: "
        f"{part} is used in its place"
        for name, part in (
            ("config.json", "mlx-lm's code for the architecture"),
            ("tokenizer_config.json", "the tokenizer in the files beside it"),
        )
        if name in files and read_json(files[name]).get("auto_map")
    )


def _refuse_without_weights(path: Path, files: Folder) -> Exception:
    if pickles := _pickles(files):
        return _refuse_pickle(path, pickles[0])
    if not files:
        return refusal(f"{path} is empty: give the folder that holds the model", path)
    if halves := [name for name in files.at_top() if unfinished(name).endswith(".safetensors")]:
        return refusal(
            f"the download of {unfinished(halves[0])} in {path} is not finished: download it again",
            path,
            file=unfinished(halves[0]),
            leftover=halves[0],
        )
    if gguf := [name for name in files if name.lower().endswith(".gguf")]:
        return refusal(
            f"the weights in {path} are GGUF ({examples(gguf)}), which is not read; give the "
            "folder with safetensors that they were made from",
            path,
            files=gguf[:10],
        )
    below = {str(PurePosixPath(name).parent) for name in files if name.endswith(".safetensors")}
    steps = {int(found[1]): name for name in below if (found := _STEP.search(name))}
    hint = f"; there are some in {examples(sorted(below))}" if below else ""
    if steps:
        hint += f", of which {steps[max(steps)]} is the latest: give that folder"
    return refusal(f"{path} has no weights (model*.safetensors){hint}", path)


def _pickles(files: Folder) -> list[str]:
    """Names of files at the top of the folder that look like pickled weights."""
    return [
        name
        for name in files.at_top()
        if PurePosixPath(name).suffix.lower() in PICKLE_SUFFIXES and not matches_any(_STATES, name)
    ]
