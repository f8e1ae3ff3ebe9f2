"""What `log_model` takes, as files without any code: safetensors and a description.

Nothing here reads or writes a pickle.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlops.checkpoints import CheckpointFile, list_files, recognise, stored_files
from mlops.errors import MissingDependencyError, PackagingError, TrackingError

WEIGHTS_FILE = "model.safetensors"
DESCRIPTION_FILE = "mlops-model.json"
WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".onnx", ".mlxfn", ".pt2", ".mlmodel")

_ACCEPTED = (
    "the folder of a checkpoint, an mlx.nn.Module, or a dict of arrays (all MLX or all NumPy)"
)


def checkpoint_files(path: Path) -> list[CheckpointFile]:
    """What a checkpoint consists of, as packaging stores it; without pickles.

    Of a folder, or a weight file, that packaging would not take, all files.

    Raises:
        TrackingError: nothing is there, no weights are in it, or a link leads out of it.
    """
    if not path.exists():
        raise TrackingError(f"there is no checkpoint at {path}")
    try:
        try:
            files = stored_files(recognise(path))
        except (PackagingError, MissingDependencyError):
            files = list_files(path)
    except PackagingError as exc:
        raise TrackingError(exc.message) from exc
    if not any(file.relative_path.endswith(WEIGHT_SUFFIXES) for file in files):
        raise TrackingError(
            f"{path} holds no weights that are safe to load ({', '.join(WEIGHT_SUFFIXES)}); "
            "save them as safetensors"
        )
    return files


def files_digest(files: list[CheckpointFile]) -> str:
    """`sha256:` and the digest of the canonical JSON of every file's path, SHA-256 and size.

    Raises:
        TrackingError: a file cannot be read.
    """
    content = []
    for file in files:
        try:
            with file.path.open("rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as exc:
            raise TrackingError(f"{file.path} cannot be read: {exc.strerror}") from exc
        content.append({"path": file.relative_path, "sha256": sha256, "size": file.size})
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def write_weights(model: Any, folder: Path) -> None:
    """Write a module's parameters, or a dict of arrays, and their description into `folder`.

    Raises:
        TrackingError: `model` is anything else, or holds no arrays.
    """
    tree = model.parameters() if _is_module(model) else model
    if not isinstance(tree, Mapping):
        raise TrackingError(f"log_model takes {_ACCEPTED}, not {_name(model)}")
    pairs = list(_flatten(tree))
    arrays = dict(pairs)
    if not arrays or len(arrays) != len(pairs):
        raise TrackingError("log_model needs arrays to log, each under a name of its own")
    try:
        _save(arrays, folder / WEIGHTS_FILE)
    except OSError as exc:
        raise TrackingError(f"the weights cannot be written to {folder}: {exc}") from exc
    description = {
        "class": _name(model),
        "weights": WEIGHTS_FILE,
        "num_parameters": sum(int(array.size) for array in arrays.values()),
        "tensors": {
            key: {"shape": list(array.shape), "dtype": str(array.dtype).removeprefix("mlx.core.")}
            for key, array in arrays.items()
        },
    }
    (folder / DESCRIPTION_FILE).write_text(json.dumps(description, indent=1), encoding="utf-8")


def _save(arrays: dict[str, Any], path: Path) -> None:
    if all(_is_mlx_array(array) for array in arrays.values()):
        import mlx.core as mx

        mx.save_safetensors(str(path), arrays, metadata={"format": "mlx"})
    elif all(_is_plain_numpy(array) for array in arrays.values()):
        import numpy as np
        from safetensors.numpy import save_file

        save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, path)
    else:
        wrong = next(
            (v for v in arrays.values() if not (_is_mlx_array(v) or _is_plain_numpy(v))), None
        )
        what = "a mixture of both" if wrong is None else f"one that holds {_name(wrong)}"
        raise TrackingError(f"log_model takes {_ACCEPTED}, not {what}")


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts and lists, named as MLX names them: `layers.0.weight`."""
    if isinstance(tree, Mapping):
        items: Any = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        yield prefix, tree
        return
    for key, value in items:
        yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))


def _is_module(model: Any) -> bool:
    nn = sys.modules.get("mlx.nn")  # not imported: then nobody can have made one
    return nn is not None and isinstance(model, nn.Module)


def _is_mlx_array(value: Any) -> bool:
    core = sys.modules.get("mlx.core")
    return core is not None and isinstance(value, core.array)


def _is_plain_numpy(value: Any) -> bool:
    """A NumPy array of numbers or booleans; arrays of Python objects could only be pickled."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray) and value.dtype.kind in "biuf"


def _name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
