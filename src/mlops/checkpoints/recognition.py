"""Say what is at a path, from file names and headers; no weights are read and nothing is run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from mlops.checkpoints.adapters import MLX_LM_WEIGHTS, PEFT_WEIGHTS, recognise_adapter
from mlops.checkpoints.checkpoint import Checkpoint
from mlops.checkpoints.files import PICKLE_SUFFIXES, CheckpointFile, list_files, read_json
from mlops.checkpoints.language_model import recognise_language_model
from mlops.checkpoints.other_formats import FORMATS, recognise_other
from mlops.checkpoints.peft_config import CONFIG
from mlops.checkpoints.refusal import examples, refusal
from mlops.hardware.home import expand


def recognise(path: str | Path) -> Checkpoint:
    """Recognise a folder (or a single file of another library) and check that it is whole.

    1. list the files: nothing leads out of the folder, nothing but regular files;
    2. no Python code of its own (one that `auto_map` names is passed over, with a warning);
    3. an adapter, a language model or a model of another library, each checked by its own module.

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
    files = {file.relative_path: file for file in list_files(path)}
    _refuse_code(path, files)
    has_adapter = any(name in files for name in (CONFIG, MLX_LM_WEIGHTS, PEFT_WEIGHTS))
    safetensors = [name for name in files if name.endswith(".safetensors") and "/" not in name]
    has_model = any(name.startswith("model") for name in safetensors)
    if has_adapter and has_model:
        raise refusal(f"{path} holds both a model and an adapter; give each its own folder", path)
    if has_adapter and (safetensors or not _pickles(path)):
        found = recognise_adapter(path, files)
        return replace(found, warnings=(*found.warnings, *_warn_of_code(files)))
    if safetensors:
        found = recognise_language_model(path, files)
        return replace(found, warnings=(*found.warnings, *_warn_of_code(files)))
    checkpoint = recognise_other(path, files)
    if checkpoint is None:
        raise _refuse_without_weights(path, files)
    return checkpoint


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
    code = [name for name in files if name.endswith((".py", ".pyc", ".so", ".dylib"))]
    if code:
        raise refusal(
            f"{path} brings its own code ({examples(code)}), which is never run; remove it if the "
            "model works without",
            path,
            files=code[:10],
        )
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


def _refuse_without_weights(path: Path, files: Mapping[str, CheckpointFile]) -> Exception:
    pickles = _pickles(path)
    if pickles:
        return _refuse_pickle(path, pickles[0])
    if not files:
        return refusal(f"{path} is empty: give the folder that holds the model", path)
    below = sorted(
        {str(PurePosixPath(name).parent) for name in files if name.endswith(".safetensors")}
    )
    hint = f"; there are some in {examples(below)}" if below else ""
    return refusal(f"{path} has no weights (model*.safetensors){hint}", path)


def _pickles(path: Path) -> list[str]:
    """Names of files at the top of the folder that look like pickled weights."""
    return sorted(
        entry.name
        for entry in path.iterdir()
        if entry.suffix.lower() in PICKLE_SUFFIXES and entry.is_file()
    )
