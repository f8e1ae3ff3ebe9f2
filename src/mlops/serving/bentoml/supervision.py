"""How a worker that cannot load its model ends the whole `bentoml serve`.

BentoML starts a dead worker again and again, and never gives up. So the command gives its workers a
private folder; one that fails leaves its reason there and asks the command's process to stop, which
then prints the reason and exits with a failure. Outside of the command nothing happens here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlops.errors import MLOpsError, ServiceError
from mlops.serving.bentoml import logs

if TYPE_CHECKING:
    from bentoml import Service

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "MLOPS_SUPERVISOR_FOLDER"
PROCESS_VARIABLE = "MLOPS_SUPERVISOR_PID"
WORKERS_VARIABLE = "MLOPS_SUPERVISOR_WORKERS"
"""How many workers there are; the command line wins over the service's configuration."""

RELOAD_VARIABLE = "MLOPS_SUPERVISOR_RELOADS"
"""Set where the workers start again when the code changes: a failure waits for that."""

MAX_DEATHS = 3
"""Workers that may die while they load before the service is given up."""

_REASON = "reason"


@contextlib.contextmanager
def supervised(workers: int = 1, environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """Run servers in this block; raises when a worker has reported that it cannot load.

    Args:
        workers: how many workers the service has.
        environment: more variables for the workers.

    Raises:
        ServiceError: with the worker's reason.
    """
    with tempfile.TemporaryDirectory(prefix="mlops-serve-") as folder:
        variables = {
            **(environment or {}),
            FOLDER_VARIABLE: folder,
            PROCESS_VARIABLE: str(os.getpid()),
            WORKERS_VARIABLE: str(workers),
        }
        os.environ.update(variables)
        try:
            yield
        finally:
            for variable in variables:
                os.environ.pop(variable, None)
        reason = Path(folder, _REASON)
        if reason.exists():
            raise ServiceError(reason.read_text(encoding="utf-8"), "load_model")


def begin_loading(service: Service[Any]) -> bool:
    """Note that this worker begins to load, and open its log.

    Returns:
        False when too many workers died at it: then there is no use in trying again.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return True
    logs.attach(service)
    dead = _dead_workers(folder)
    if len(dead) >= MAX_DEATHS:
        report_failure(
            ServiceError(
                f"{len(dead)} workers died while loading the model, most likely for want of "
                "memory: use fewer workers or a smaller model",
                "load_model",
            )
        )
        return False
    Path(folder, str(os.getpid())).touch()
    return True


def end_loading() -> None:
    """Note that this worker has loaded its model, or was asked to stop.

    The deaths before it count no more: what can be loaded was interrupted, or has changed since.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder and Path(folder).is_dir():  # the command may have ended first
        for name in (str(os.getpid()), *_dead_workers(folder)):
            Path(folder, name).unlink(missing_ok=True)


def is_supervised() -> bool:
    """Whether this is a worker of the command, or the command itself."""
    return bool(os.environ.get(FOLDER_VARIABLE))


def folder() -> Path | None:
    """The private folder of this run of the command, gone when it ends; None outside of it."""
    place = os.environ.get(FOLDER_VARIABLE)
    return Path(place) if place else None


def planned_workers(configured: int) -> int:
    """How many workers the service has: as the command says, else as configured."""
    return int(os.environ.get(WORKERS_VARIABLE) or configured)


def report_failure(exc: Exception) -> None:
    """Leave the reason and ask the command's process to stop. The first reason counts.

    With `--reload` the server goes on: the next change may mend it.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return
    message = str(exc) if isinstance(exc, MLOpsError) else f"{type(exc).__name__}: {exc}"
    if os.environ.get(RELOAD_VARIABLE):
        logger.error("%s; waiting for a change of the code or the model", message)
        return
    with contextlib.suppress(FileExistsError), Path(folder, _REASON).open("x") as file:
        file.write(message)
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(os.environ[PROCESS_VARIABLE]), signal.SIGTERM)


def _dead_workers(folder: str) -> list[str]:
    """The process ids of workers that have died while they loaded."""
    workers = [path.name for path in Path(folder).iterdir() if path.name.isdigit()]
    return [name for name in workers if not _is_alive(int(name))]


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
