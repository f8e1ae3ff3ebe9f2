"""What `log_input` takes, as MLflow's record of a dataset: name, digest, source and size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlops.checkpoints.files import CheckpointFile
from mlops.client.connection import translated
from mlops.client.weights import files_digest
from mlops.errors import TrackingError

_DIGEST_CHARS = 36  # MLflow's limit


def dataset_entity(dataset: Any, name: str | None = None) -> Any:
    """MLflow's `entities.Dataset` for a file, a folder, or a dataset of `mlflow.data`.

    Raises:
        TrackingError: it is none of these, or nothing is there.
    """
    if isinstance(dataset, str | Path):
        return _of_files(Path(dataset), name)
    with translated("read the dataset"):
        from mlflow.data.dataset import Dataset as MLflowDataset
        from mlflow.entities import Dataset

        if not isinstance(dataset, MLflowDataset):
            raise TrackingError(
                "log_input takes a file, a folder, or a dataset of mlflow.data, "
                f"not {type(dataset).__name__}"
            )
        facts = dataset.to_dict()
        return Dataset(**{**facts, "name": name or facts["name"]})


def _of_files(path: Path, name: str | None) -> Any:
    if not path.exists():
        raise TrackingError(f"there is no data at {path}")
    paths = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [
        CheckpointFile(file.relative_to(path).as_posix(), file, file.stat().st_size)
        for file in paths
        if file.is_file()
    ]
    digest = files_digest(files)
    facts = {
        "num_files": len(files),
        "size_bytes": sum(file.size for file in files),
        "digest": digest,
    }
    with translated("describe the dataset"):
        from mlflow.entities import Dataset

        return Dataset(
            name=name or path.name,
            digest=digest.removeprefix("sha256:")[:_DIGEST_CHARS],
            source_type="local",
            source=json.dumps({"uri": str(path.absolute())}),
            profile=json.dumps(facts),
        )
