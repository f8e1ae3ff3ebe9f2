"""The client itself: runs, what is logged in them, models, and the link to packages."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Any, Literal, Self

from mlops.client.connection import (
    Connection,
    check_project_name,
    resolve_tracking_uri,
    translated,
)
from mlops.client.datasets import dataset_entity
from mlops.client.lineage import find_origin
from mlops.client.link_queue import FlushResult, LinkResult, PackageLink, read_facts, read_parts
from mlops.client.links import PackageLinker, is_misuse, runs_of
from mlops.client.runs import (
    DIGEST_TAG,
    EXTERNAL_TAG,
    LINK_TAG,
    MAX_PARAM_CHARS,
    MAX_TAG_CHARS,
    checked_key,
    checked_texts,
    create_logged_model,
    create_run,
    parts,
    write_params,
    write_tags,
)
from mlops.client.weights import checkpoint_files, files_digest, write_weights
from mlops.errors import TrackingError

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

PATH_TAG = "mlops.path"
_METRICS_PER_CALL = 1000  # MLflow's limit

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoggedModel:
    """A model in MLflow.

    Attributes:
        model_id: MLflow's id.
        name: as given to `log_model`.
        uri: `models:/ID`.
        run_id: the run that produced it.
        path: the folder it refers to, or None when MLflow holds the files.
        digest: `sha256:` of the checkpoint's files; None for a module or arrays.
    """

    model_id: str
    name: str
    uri: str
    run_id: str
    path: Path | None = None
    digest: str | None = None


class ActiveRun:
    """A run that is open. As a context manager it ends the run with the fitting status."""

    def __init__(self, client: TrackingClient, run_id: str) -> None:
        self._client = client
        self.run_id = run_id

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._client._leave(self.run_id, exc)


def create_client(project_name: str, *, tracking_uri: str | None = None) -> TrackingClient:
    """A client for the runs of one project. Nothing is opened before its first use.

    Args:
        project_name: MLflow's experiment; made when missing.
        tracking_uri: the MLflow store. By default `MLFLOW_TRACKING_URI`, else the SQLite file
            `mlflow.db` in the working directory, with artifacts in `mlartifacts` beside it.

    Raises:
        ConfigError: the name or the address is none.
    """
    return TrackingClient(project_name, tracking_uri=tracking_uri)


class TrackingClient:
    """Logs into one MLflow experiment.

    What is logged goes to the run opened last. Without one, a run is opened, and it ends with
    `close()`, with the client's `with` block, or with the process. Every method that logs raises
    `TrackingError` when MLflow is down or refuses.
    """

    def __init__(self, project_name: str, *, tracking_uri: str | None = None) -> None:
        self.project_name = check_project_name(project_name)
        self._connection = Connection(resolve_tracking_uri(tracking_uri))
        self._linker = PackageLinker(self._connection)
        self._lock = RLock()
        self._open_runs: list[str] = []
        self._last_run: str | None = None

    # Runs

    @property
    def tracking_uri(self) -> str:
        """The MLflow store, without credentials."""
        return self._connection.public_uri

    @property
    def active_run_id(self) -> str | None:
        """The run that is logged to; None when none is open."""
        return self._open_runs[-1] if self._open_runs else None

    @property
    def run_id(self) -> str | None:
        """The active run, else the one that ended last, else None."""
        return self.active_run_id or self._last_run

    def start_run(
        self, run_name: str | None = None, tags: Mapping[str, Any] | None = None
    ) -> ActiveRun:
        """Open a run; inside another one it becomes its child, and logging goes to the child.

        As a context manager it ends as FINISHED, after an exception as FAILED, after Ctrl-C as
        KILLED. Without `with`, call `end_run`.
        """
        checked = checked_texts(tags or {}, "tag", MAX_TAG_CHARS)
        with self._lock:
            parent = self.active_run_id
            if parent:
                checked["mlflow.parentRunId"] = parent
            run_id = create_run(self._connection, self.project_name, checked, run_name)
            if not self._open_runs:
                atexit.register(self._close_at_exit, os.getpid())
            self._open_runs.append(run_id)
        return ActiveRun(self, run_id)

    def end_run(self, status: RunStatus = "FINISHED") -> None:
        """End the active run; does nothing when none is open."""
        if status not in {"FINISHED", "FAILED", "KILLED"}:
            raise TrackingError(f"status must be FINISHED, FAILED or KILLED, not {status!r}")
        if self.active_run_id:
            self._end(self.active_run_id, status)

    def close(self, status: RunStatus = "FINISHED") -> None:
        """End every open run. The client can be used again and then opens a new one."""
        if self._open_runs:
            self._connection.check()  # MLflow would try for minutes
        while self._open_runs:
            self.end_run(status)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._open_runs:
            self._leave(self._open_runs[0], exc)

    # Parameters, metrics, tags, artifacts

    def log_param(self, key: str, value: Any) -> None:
        """Log one parameter. See `log_params`."""
        self.log_params({key: value})

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters, as text of at most 6,000 characters each.

        A parameter never changes in MLflow: a second, different value is written as a tag of the
        same name, with a warning, and the parameter keeps the first.
        """
        texts = checked_texts(params, "parameter", MAX_PARAM_CHARS)
        if texts:
            write_params(self._connection, self._run(), texts)

    def log_metric(self, key: str, value: Any, step: int | None = None) -> None:
        """Log one number. See `log_metrics`."""
        self.log_metrics({key: value}, step)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log numbers (Python's, NumPy's, MLX's) at a training step; 0 when None."""
        numbers = {checked_key(k, "metric"): _number(k, value) for k, value in metrics.items()}
        if not numbers:
            return
        run_id = self._run()
        now_ms = int(time.time() * 1000)
        with translated(f"log the metrics {', '.join(numbers)}"):
            from mlflow.entities import Metric

            entries = [Metric(key, value, now_ms, step or 0) for key, value in numbers.items()]
            for part in parts(entries, _METRICS_PER_CALL):
                self._mlflow.log_batch(run_id, metrics=part)

    def set_tag(self, key: str, value: Any) -> None:
        """Set one tag, as text of at most 8,000 characters; replaces an earlier value."""
        self.set_tags({key: value})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags. See `set_tag`."""
        texts = checked_texts(tags, "tag", MAX_TAG_CHARS)
        if texts:
            write_tags(self._connection, self._run(), texts)

    def log_artifact(self, path: str | Path, artifact_path: str | None = None) -> None:
        """Copy a file, or a folder with its name, into the run's artifacts.

        Args:
            artifact_path: the folder among the artifacts to put it in.
        """
        if not Path(path).exists():
            raise TrackingError(f"there is no file to log at {path}")
        run_id = self._run()
        with translated(f"log the artifact {path}"):
            self._mlflow.log_artifact(run_id, str(path), artifact_path)

    def log_artifacts(self, folder: str | Path, artifact_path: str | None = None) -> None:
        """Copy what is in a folder into the run's artifacts."""
        if not Path(folder).is_dir():
            raise TrackingError(f"there is no folder to log at {folder}")
        run_id = self._run()
        with translated(f"log the artifacts in {folder}"):
            self._mlflow.log_artifacts(run_id, str(folder), artifact_path)

    def log_input(
        self, dataset: Any, name: str | None = None, *, context: str = "training"
    ) -> None:
        """Log which data the run used; MLflow shows it on the run's page.

        Args:
            dataset: a file or folder, of which MLflow gets path, size and digest; or one of
                MLflow's own datasets (`mlflow.data`).
            name: for MLflow; by default the file's.
            context: what it is used for, such as `training` or `evaluation`.

        Raises:
            TrackingError: `dataset` is neither, or MLflow is down or refuses.
        """
        entity = dataset_entity(dataset, name)
        run_id = self._run()
        with translated(f"log the dataset {entity.name!r}"):
            from mlflow.entities import DatasetInput, InputTag

            tags = [InputTag("mlflow.data.context", context)]
            self._mlflow.log_inputs(run_id, [DatasetInput(entity, tags)])

    # Models

    def log_model(
        self,
        model: Any,
        name: str,
        *,
        copy: bool = False,
        tags: Mapping[str, Any] | None = None,
    ) -> LoggedModel:
        """Log a model as an output of the active run. No pickle is ever written or copied.

        Args:
            model: the folder of a checkpoint; or an `mlx.nn.Module` or a (nested) dict of MLX or of
                NumPy arrays, whose weights are stored in MLflow as safetensors.
            name: for MLflow, without any of `/ : . % " '`.
            copy: store the bytes of a checkpoint's folder in MLflow too. By default MLflow gets
                only its path and digest.
            tags: set on the model.

        Raises:
            TrackingError: `model` is none of these, or MLflow is down or refuses.
        """
        checked = checked_texts(tags or {}, "tag", MAX_TAG_CHARS)
        if isinstance(model, str | Path):
            path = Path(model).absolute()
            files = checkpoint_files(path)
            digest = files_digest(files)
            if not copy:
                facts = {PATH_TAG: str(path), DIGEST_TAG: digest, EXTERNAL_TAG: "true"}
                return self._store_model(name, {**checked, **facts}, [], path)
            copies = [(f.path, f.relative_path.rpartition("/")[0]) for f in files]
            return self._store_model(name, {**checked, DIGEST_TAG: digest}, copies)
        if copy:
            raise TrackingError("copy is for the folder of a checkpoint; arrays are always stored")
        with tempfile.TemporaryDirectory(prefix="mlops-log-model-") as folder:
            write_weights(model, Path(folder))
            copies = [(path, "") for path in sorted(Path(folder).iterdir())]
            return self._store_model(name, checked, copies)

    def load_model_files(self, run_or_model_id: str, destination: str | Path | None = None) -> Path:
        """The folder with a logged model's files.

        That is the checkpoint's own folder when it was logged without a copy (its digest is checked
        first), and MLflow's folder when that is on this machine; else the files are downloaded.

        Args:
            run_or_model_id: of a run, the model that was logged last is taken.
            destination: an existing folder for a download; by default a new temporary one.

        Raises:
            TrackingError: there is no such model, or the files changed since it was logged.
        """
        model = self._find_model(run_or_model_id)
        if PATH_TAG in model.tags:
            path = Path(model.tags[PATH_TAG])
            if files_digest(checkpoint_files(path)) != model.tags.get(DIGEST_TAG):
                raise TrackingError(
                    f"the files in {path} changed since {model.name} was logged; log it again"
                )
            return path
        with translated(f"download the model {model.name}"):
            from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

            repository = get_artifact_repository(
                model.artifact_location, tracking_uri=self._connection.tracking_uri
            )
            return Path(
                repository.download_artifacts("", str(destination) if destination else None)
            )

    # Packages

    def link_package(self, result: Mapping[str, Any], *, run_id: str | None = None) -> LinkResult:
        """Tie a package to a run, in both directions.

        The run gets `model_tag`, `bento_tag`, `model_digest` and `project_name` as parameters and
        tags; an external logged model with the same tags refers back to the run. Tags name each
        adapter and the base with their digests and the runs that they come from, and those runs
        get tags with the package (`mlops.client.lineage` says how they are found). When MLflow is
        down or refuses, the link is queued, and sent with the next one that succeeds.

        Args:
            result: what `package_model` returned; values may be None.
            run_id: a run of this store; by default the active one. With neither, the run of this
                project that has the same link already, else one is opened.

        Raises:
            TrackingError: `result` is no packaging result, or there is no run `run_id`.
        """
        link = PackageLink(
            self.tracking_uri,
            self.project_name,
            run_id or self.active_run_id,
            read_facts(result),
            read_parts(result),
        )
        try:
            self._connection.check()
            if link.run_id is None and not self._linker.is_sent(link):
                link = replace(link, run_id=self._run())
            done = self._linker.send(link)
        except TrackingError as exc:
            if run_id and is_misuse(exc):
                raise
            return self._linker.keep_for_later(link, str(exc))
        waiting = self.flush_queue()
        if waiting.reason:
            logger.warning("links of earlier packages still wait: %s", waiting.reason)
        return done

    def flush_queue(self) -> FlushResult:
        """Send the links that wait for this MLflow store. Sending one twice does no harm."""
        return self._linker.flush()

    def runs_of(self, tag: str) -> list[str]:
        """The runs of this project that a model tag or bento tag is linked to, newest first.

        For an adapter of a package that is also the run which logged the adapter.
        """
        return runs_of(self._connection, self.project_name, tag)

    def source_run(self, path: str | Path) -> str | None:
        """The first run, of any project, that logged the files of this checkpoint; else None.

        Raises:
            TrackingError: there is no checkpoint, or MLflow is down.
        """
        digest = files_digest(checkpoint_files(Path(path)))
        origin = find_origin(self._connection, "model", {"files_digest": digest})
        return origin.run.run_id if origin else None

    # Below: how

    @property
    def _mlflow(self) -> Any:
        return self._connection.client

    def _run(self) -> str:
        with self._lock:
            return self.active_run_id or self.start_run().run_id

    def _end(self, run_id: str, status: RunStatus) -> None:
        """End a run, after those that were opened inside of it."""
        with self._lock:
            while run_id in self._open_runs:
                with translated("end the run"):
                    self._mlflow.set_terminated(self._open_runs[-1], status)
                self._forget_last()

    def _leave(self, run_id: str, exc: BaseException | None) -> None:
        try:
            if run_id in self._open_runs:
                self._connection.check()
                self._end(run_id, _status_after(exc))
        except TrackingError as error:
            if exc is None:
                raise
            logger.warning("the run stays open in MLflow: %s", error)  # `exc` matters more
        finally:
            with self._lock:
                while run_id in self._open_runs:
                    self._forget_last()

    def _forget_last(self) -> None:
        self._last_run = self._open_runs.pop()
        if not self._open_runs:
            atexit.unregister(self._close_at_exit)

    def _close_at_exit(self, process_id: int) -> None:
        if os.getpid() != process_id:  # a forked child ends; the run is its parent's
            return
        # Python keeps the exception that ended the program; at a prompt it is only the latest.
        crash = None if hasattr(sys, "ps1") else getattr(sys, "last_value", None)
        try:
            self.close(_status_after(crash))
        except TrackingError as exc:
            logger.warning("the run stays open in MLflow: %s", exc)

    def _store_model(
        self,
        name: str,
        tags: dict[str, str],
        copies: list[tuple[Path, str]],
        source: Path | None = None,
    ) -> LoggedModel:
        run_id = self._run()
        experiment = self._connection.experiment_id(self.project_name)
        model = create_logged_model(
            self._connection, experiment, run_id, name=name, tags=tags, copies=copies
        )
        return LoggedModel(
            model_id=model.model_id,
            name=model.name,
            uri=f"models:/{model.model_id}",
            run_id=run_id,
            path=source,
            digest=tags.get(DIGEST_TAG),
        )

    def _find_model(self, run_or_model_id: str) -> Any:
        with translated(f"find a model of {run_or_model_id!r}"):
            if run_or_model_id.startswith("m-"):
                return self._mlflow.get_logged_model(run_or_model_id)
            run = self._mlflow.get_run(run_or_model_id)
            models = self._mlflow.search_logged_models(
                [run.info.experiment_id], f"source_run_id = '{run.info.run_id}'"
            )
        logged = [model for model in models if LINK_TAG not in model.tags]
        if not logged:
            raise TrackingError(f"no model was logged in the run {run_or_model_id}")
        return max(logged, key=lambda model: model.creation_timestamp)


def _status_after(exc: BaseException | None) -> RunStatus:
    if exc is None or (isinstance(exc, SystemExit) and not exc.code):
        return "FINISHED"
    return "KILLED" if isinstance(exc, KeyboardInterrupt) else "FAILED"


def _number(key: str, value: Any) -> float:
    error = TrackingError(f"the metric {key!r} must be a number, not {repr(value)[:80]}")
    if isinstance(value, str | bytes):
        raise error
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as exc:
        raise error from exc
