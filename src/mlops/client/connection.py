"""The way to one MLflow store: where it is, whether it answers, and its errors in our words.

Everything goes through an `MlflowClient` of its own, so MLflow's process-wide settings stay as the
user has them and clients of several stores live side by side.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import RLock
from typing import Any
from urllib.parse import urlsplit

from mlops.errors import ConfigError, TrackingError

CHECK_TIMEOUT_S = 3
"""How long `Connection.check` waits for a store before it counts as down."""

logger = logging.getLogger(__name__)

_MAX_PROJECT_NAME = 500  # characters; MLflow's limit for an experiment
_SQLITE = "sqlite:///"
_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


def resolve_tracking_uri(tracking_uri: str | None) -> str:
    """The argument, else `MLFLOW_TRACKING_URI`, else `mlflow.db` in the working directory.

    SQLite paths become absolute, so a later change of directory does not move the store.

    Raises:
        ConfigError: the URI is empty or names an SQLite store in memory.
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}mlflow.db"
    if not isinstance(uri, str) or not uri.strip():
        raise ConfigError(f"tracking_uri must be the address of an MLflow store, not {uri!r}")
    if not uri.startswith("sqlite:"):
        return uri
    path, _, query = uri.removeprefix(_SQLITE).partition("?")
    if not uri.startswith(_SQLITE) or path in {"", ":memory:"}:
        raise ConfigError(f"tracking_uri {uri!r} names no file; write sqlite:///FILE")
    return f"{_SQLITE}{Path(path).absolute()}" + (f"?{query}" if query else "")


def without_credentials(text: str) -> str:
    """`text` with the user and password of every address in it removed."""
    return _CREDENTIALS.sub("", text)


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn every error of MLflow and of the libraries below it into a `TrackingError`."""
    _import_mlflow()
    import requests
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (
        MlflowException,
        sqlalchemy.exc.SQLAlchemyError,
        requests.RequestException,
        ImportError,  # the driver of a database
        OSError,
    ) as exc:
        reason = (without_credentials(str(exc)).strip() or type(exc).__name__).splitlines()[0]
        raise TrackingError(f"MLflow could not {what}: {reason[:500]}") from exc


def error_code(error: TrackingError) -> str:
    """MLflow's code for what went wrong, such as `RESOURCE_DOES_NOT_EXIST`, else ""."""
    return str(getattr(error.__cause__, "error_code", ""))


class Connection:
    """One MLflow store. Making one does nothing; the store is looked for at the first use."""

    def __init__(self, tracking_uri: str) -> None:
        self.tracking_uri = tracking_uri
        self.public_uri = without_credentials(tracking_uri)
        self._lock = RLock()
        self._client: Any = None
        self._experiments: dict[str, str] = {}

    @property
    def client(self) -> Any:
        """The `MlflowClient`.

        Raises:
            TrackingError: the store is down or is none.
        """
        with self._lock:
            if self._client is None:
                self.check()
                mlflow = _import_mlflow()
                with translated(f"open {self.public_uri}"):
                    if self.tracking_uri.startswith(_SQLITE):
                        _create_database(self._sqlite_path())
                    self._client = mlflow.MlflowClient(tracking_uri=self.tracking_uri)
            return self._client

    def check(self) -> None:
        """Ask the store for a sign of life, for `CHECK_TIMEOUT_S` at most.

        MLflow itself goes on trying for minutes, or for hours with a database.

        Raises:
            TrackingError: there is none; says what was tried.
        """
        address = urlsplit(self.tracking_uri)
        try:
            if address.scheme in {"http", "https"}:
                self._check_server()
            elif address.scheme == "sqlite":
                self._check_sqlite()
            elif port := _DATABASE_PORTS.get(address.scheme.partition("+")[0]):
                host = (address.hostname or "localhost", address.port or port)
                socket.create_connection(host, timeout=CHECK_TIMEOUT_S).close()
        except (OSError, sqlite3.Error) as exc:
            raise TrackingError(
                f"MLflow's store {self.public_uri} cannot be used: {exc}; start it, or set "
                "MLFLOW_TRACKING_URI to another"
            ) from exc

    def require(self) -> None:
        """Ask for a store that is there: a database file is not made.

        Raises:
            TrackingError: there is none, or it is down.
        """
        if self.tracking_uri.startswith(_SQLITE) and not self._sqlite_path().exists():
            raise TrackingError(f"there is no MLflow store {self.public_uri}")
        self.check()

    def experiment_id(self, project_name: str) -> str:
        """The experiment of a project; made when missing, restored when deleted.

        Raises:
            TrackingError: the store is down or refuses.
        """
        with self._lock:
            if project_name not in self._experiments:
                with translated(f"open the experiment {project_name!r}"):
                    self._experiments[project_name] = self._find_or_create(project_name)
            return self._experiments[project_name]

    def _find_or_create(self, project_name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self.client.get_experiment_by_name(project_name)
        if experiment is None:
            try:
                return str(
                    self.client.create_experiment(
                        project_name, artifact_location=self._artifact_location()
                    )
                )
            except MlflowException as exc:
                if exc.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                # Another process was faster.
                experiment = self.client.get_experiment_by_name(project_name)
        if experiment.lifecycle_stage == "deleted":
            logger.warning("the deleted MLflow experiment %r is restored", project_name)
            self.client.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id)

    def _artifact_location(self) -> str | None:
        """Beside an SQLite store, wherever the process runs; a server decides for itself."""
        if not self.tracking_uri.startswith(_SQLITE):
            return None
        return (self._sqlite_path().parent / "mlartifacts").as_uri()

    def _sqlite_path(self) -> Path:
        return Path(self.tracking_uri.removeprefix(_SQLITE).partition("?")[0])

    def _check_sqlite(self) -> None:
        path = self._sqlite_path()
        if not path.exists():
            if not path.parent.is_dir():
                raise NotADirectoryError(f"{path.parent} is not a folder")
            if not os.access(path.parent, os.W_OK):
                raise PermissionError(f"{path.parent} is not writable")
            return
        if not os.access(path, os.W_OK):
            raise PermissionError(f"{path} is not writable")
        with closing(sqlite3.connect(path, timeout=CHECK_TIMEOUT_S)) as database:
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()

    def _check_server(self) -> None:
        _import_mlflow()
        from mlflow.exceptions import MlflowException
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request

        try:
            # MLflow's own function knows the user's credentials and certificates.
            response = http_request(
                get_default_host_creds(self.tracking_uri),
                "/health",
                "GET",
                max_retries=0,
                timeout=CHECK_TIMEOUT_S,
                raise_on_status=False,
            )
        except MlflowException as exc:
            raise ConnectionError(without_credentials(str(_first_cause(exc)))) from exc
        if response.status_code >= 500:
            raise ConnectionError(f"it answers with status {response.status_code}")


def _create_database(path: Path) -> None:
    """Lay out an SQLite store, unless it exists, so that it appears complete or not at all.

    MLflow builds its tables in the final file, in several seconds: processes that begin together
    fail, and one that is stopped leaves a file that no MLflow can open.
    """
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if path.exists():
            return
        unfinished = path.with_name(f".{path.name}.new")
        unfinished.unlink(missing_ok=True)
        _import_mlflow().MlflowClient(tracking_uri=f"{_SQLITE}{unfinished}")
        unfinished.rename(path)
    finally:
        os.close(folder)


def check_project_name(project_name: str) -> str:
    """The name of a project, when it is one.

    Raises:
        ConfigError: it is empty, too long or no printable text.
    """
    if (
        not isinstance(project_name, str)
        or not project_name.strip()
        or not project_name.isprintable()
        or len(project_name) > _MAX_PROJECT_NAME
    ):
        raise ConfigError(
            f"project_name must be 1 to {_MAX_PROJECT_NAME} printable characters, "
            f"not {str(project_name)[:80]!r}"
        )
    return project_name


def _first_cause(exc: BaseException) -> BaseException:
    while earlier := exc.__cause__ or exc.__context__:
        exc = earlier
    return exc


def _import_mlflow() -> Any:
    """Import MLflow without usage statistics and without its notes about tables it creates."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read by MLflow when it is imported
    import mlflow

    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        for name in ("mlflow.store.db.utils", "mlflow.tracking.context.git_context", "alembic"):
            if logging.getLogger(name).level == logging.NOTSET:
                logging.getLogger(name).setLevel(logging.ERROR)
    return mlflow
