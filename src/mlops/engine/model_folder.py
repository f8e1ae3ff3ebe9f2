"""A folder that holds what one checkpoint consists of and nothing else, for mlx-lm to load from.

mlx-lm merges every `model*.safetensors` of the folder that it is given, in no order.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlops.checkpoints import Checkpoint


@contextlib.contextmanager
def model_folder(checkpoint: Checkpoint) -> Iterator[Path]:
    """The checkpoint's own folder; where other weights lie beside its own, one of links instead.

    The links are gone afterwards. Arrays that are not read yet can be: MLX keeps their files open.
    """
    there = {path.name for path in checkpoint.path.glob("model*.safetensors")}
    if there == set(checkpoint.weight_files):
        yield checkpoint.path
        return
    with tempfile.TemporaryDirectory(prefix="mlops-") as name:
        folder = Path(name)
        for number, weight_file in enumerate(checkpoint.weight_files):
            link = folder / f"model-{number:05}.safetensors"
            link.symlink_to((checkpoint.path / weight_file).resolve())
        for file in checkpoint.files:
            if file.endswith("config.json") and "/" not in file:
                (folder / file).symlink_to((checkpoint.path / file).resolve())
        yield folder
