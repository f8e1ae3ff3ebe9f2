"""What is written to a run: it is made, and gets parameters, tags and a logged model."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlops.client.connection import Connection, error_code, translated
from mlops.errors import TrackingError

MAX_PARAM_CHARS = 6000  # MLflow would cut longer values
MAX_TAG_CHARS = 8000
EXTERNAL_TAG = "mlflow.model.isExternal"
"""MLflow's own tag for a model whose files it does not hold."""

LINK_TAG = "mlops.link_id"
"""On what a link made: its external logged model, and the run that it was given."""
DIGEST_TAG = "mlops.files_digest"
"""On a logged model whose files are known: their digest."""

_PARAMS_PER_CALL = 100  # MLflow's limit, for tags too

logger = logging.getLogger(__name__)


def create_run(
    connection: Connection, project_name: str, tags: dict[str, str], run_name: str | None = None
) -> str:
    """A new run; it also gets MLflow's usual tags: user, source file, git commit."""
    experiment = connection.experiment_id(project_name)
    with translated("start a run"):
        from mlflow.tracking.context.registry import resolve_tags

        run = connection.client.create_run(experiment, tags=resolve_tags(tags), run_name=run_name)
        return str(run.info.run_id)


def write_params(connection: Connection, run_id: str, params: dict[str, str]) -> None:
    """Write parameters; where one has another value already, the new one becomes a tag."""
    for part in parts(list(params.items()), _PARAMS_PER_CALL):
        try:
            _log_params(connection, run_id, dict(part))
        except TrackingError as exc:
            if error_code(exc) != "INVALID_PARAMETER_VALUE":
                raise
            with translated("read the run"):
                first = connection.client.get_run(run_id).data.params
            changed = {key: value for key, value in part if first.get(key, value) != value}
            if not changed:
                raise
            logger.warning(
                "MLflow keeps the first value of a parameter; the new value of %s is a tag",
                ", ".join(changed),
            )
            write_tags(connection, run_id, changed)
            _log_params(connection, run_id, {k: v for k, v in part if k not in changed})


def write_tags(connection: Connection, run_id: str, tags: dict[str, str]) -> None:
    """Write tags over those of the same names."""
    with translated(f"set the tags {', '.join(tags)}"):
        from mlflow.entities import RunTag

        for part in parts(list(tags.items()), _PARAMS_PER_CALL):
            entries = [RunTag(key, value) for key, value in part]
            connection.client.log_batch(run_id, tags=entries)


def create_logged_model(
    connection: Connection,
    experiment: str,
    run_id: str,
    *,
    name: str,
    tags: dict[str, str],
    copies: Sequence[tuple[Path, str]] = (),
) -> Any:
    """Make an output model of a run that can be registered; when that fails, it is marked FAILED.

    Args:
        copies: files for MLflow to keep, each with the folder it goes to ("" is the top).

    Returns:
        MLflow's `LoggedModel`.
    """
    client = connection.client
    with translated(f"log the model {name!r}"):
        from mlflow.entities import LoggedModelOutput
        from mlflow.models.model import MLMODEL_FILE_NAME, Model

        model = client.create_logged_model(experiment, name=name, source_run_id=run_id, tags=tags)
        is_complete = False
        try:
            # MLflow's registry asks for this file. It names no flavor, so nothing in it can be run.
            description = Model(
                artifact_path=model.artifact_location,
                run_id=run_id,
                model_id=model.model_id,
                metadata=tags,
            )
            with tempfile.TemporaryDirectory(prefix="mlops-log-model-") as folder:
                description.save(str(Path(folder) / MLMODEL_FILE_NAME))
                client.log_model_artifacts(model.model_id, folder)
            for path, target in copies:
                client.log_model_artifact(model.model_id, str(path), target or None)
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
            is_complete = True
        finally:
            client.finalize_logged_model(model.model_id, "READY" if is_complete else "FAILED")
        return model


def checked_texts(values: Mapping[str, Any], kind: str, max_chars: int) -> dict[str, str]:
    """Names and values as text.

    Raises:
        TrackingError: a name is no text, or a value is too long for MLflow.
    """
    if not isinstance(values, Mapping):
        raise TrackingError(f"{kind}s are logged as a dict, not as {type(values).__name__}")
    texts = {checked_key(key, kind): str(value) for key, value in values.items()}
    for key, text in texts.items():
        if len(text) > max_chars:
            raise TrackingError(
                f"the {kind} {key!r} has {len(text)} characters and MLflow keeps {max_chars}; "
                "log it as an artifact"
            )
    return texts


def checked_key(key: Any, kind: str) -> str:
    """The name of a parameter, metric or tag.

    Raises:
        TrackingError: it is no text.
    """
    if not isinstance(key, str) or not key:
        raise TrackingError(f"the name of a {kind} must be text, not {key!r}")
    return key


def parts(items: Sequence[Any], size: int) -> list[list[Any]]:
    """`items` in pieces of at most `size`."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _log_params(connection: Connection, run_id: str, params: dict[str, str]) -> None:
    with translated(f"log the parameters {', '.join(params)}"):
        from mlflow.entities import Param

        entries = [Param(key, value) for key, value in params.items()]
        if entries:
            connection.client.log_batch(run_id, params=entries)
