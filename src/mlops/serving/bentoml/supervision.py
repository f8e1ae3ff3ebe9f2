"""How a worker that cannot load its model ends the whole `bentoml serve`, and who died of what.

BentoML starts a dead worker again and again, and never gives up. So the command gives its workers a
private folder. One that fails to load leaves its reason there and asks the command's process to
stop, which then prints the reason and exits with a failure. After some workers that died before
they were ready the command gives up too. Outside of the command nothing happens here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from mlops.errors import MLOpsError, ServiceError, sentence_of
from mlops.serving.http.host import log_load_failure

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "MLOPS_SUPERVISOR_FOLDER"
PROCESS_VARIABLE = "MLOPS_SUPERVISOR_PID"
WORKERS_VARIABLE = "MLOPS_SUPERVISOR_WORKERS"
"""How many workers there are; the command line wins over the service's configuration."""

RELOAD_VARIABLE = "MLOPS_SUPERVISOR_RELOADS"
"""Set where the workers start again when the code changes: a failure waits for that."""

MAX_DEATHS = 3
"""So many workers, one after the other, that die before they are ready: the service is given up."""

_REASON = "reason"
_NONE_LEFT = "No active process"  # circus's words
_READY, _FAILED = "ready-", "failed-"  # with a process id: names of files
_ASKED_TO_END = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)


@contextlib.contextmanager
def supervised(
    workers: int = 1,
    environment: Mapping[str, str] | None = None,
    ours: Collection[str] = (),
) -> Iterator[Deaths]:
    """Run servers in this block; raises when a worker has reported that it cannot load.

    Args:
        workers: how many workers the service has.
        environment: more variables for the workers.
        ours: circus's names of the services whose workers tell when they are ready.

    Raises:
        ServiceError: with the worker's reason; or no temporary folder can be made.
    """
    with _temporary_folder() as folder:
        variables = {
            **(environment or {}),
            FOLDER_VARIABLE: folder,
            PROCESS_VARIABLE: str(os.getpid()),
            WORKERS_VARIABLE: str(workers),
        }
        os.environ.update(variables)
        reason = Path(folder, _REASON)
        try:
            yield Deaths(Path(folder), ours)
        except RuntimeError as exc:  # circus, when its last worker is dead and none is started
            if reason.exists():
                raise _failure(reason) from exc
            if _NONE_LEFT not in str(exc):
                raise
            why = "the last worker has ended, and nothing here starts another"
            raise ServiceError(why, "serve") from exc
        finally:
            for variable in variables:
                os.environ.pop(variable, None)
        if reason.exists():
            raise _failure(reason)


class Deaths:
    """What the command's process makes of its workers' deaths."""

    def __init__(self, folder: Path, ours: Collection[str]) -> None:
        self._folder = folder
        self._ours = frozenset(ours)
        self._known_ready: set[str] = set()
        self._num_before_ready = 0

    def on_death(self, service: str, process_id: int, status: int, *, is_last: bool) -> bool:
        """Name a worker that has died; True gives the service up.

        Args:
            service: circus's name of it.
            status: negative for a signal.
            is_last: no worker of the service is left, and none is started.
        """
        ready = {path.name for path in self._folder.glob(f"{_READY}*")}
        if ready - self._known_ready:
            self._num_before_ready = 0  # what can be loaded was interrupted, or has changed since
        mine = f"{_READY}{process_id}"
        was_ready = mine in ready
        self._known_ready = ready - {mine}
        (self._folder / mine).unlink(missing_ok=True)
        was_asked = status in _ASKED_TO_END or (was_ready and status == 0)
        if was_asked and not is_last:
            return False
        logger.disabled = False  # BentoML's command has silenced those that it does not know
        died = f"worker {process_id} {_how(status)}"
        logger.error("%s", died)
        if is_last:
            report_failure(ServiceError(f"{died}, and nothing here starts another", "serve"))
            return True
        if was_ready or service not in self._ours:
            return False
        self._num_before_ready += 1
        if self._num_before_ready < MAX_DEATHS:
            return False
        report_failure(ServiceError(self._why_given_up(process_id, status), "load_model"))
        return True

    def _why_given_up(self, process_id: int, status: int) -> str:
        told = f"{self._num_before_ready} workers in a row ended before they were ready"
        failed = self._folder / f"{_FAILED}{process_id}"
        if failed.exists():
            return f"{told}, the last with {failed.read_text(encoding='utf-8')}"
        if status == -signal.SIGKILL:
            return (
                f"{told}, the last one killed by SIGKILL, most likely for want of memory: use "
                "fewer workers or a smaller model"
            )
        return f"{told}, and the last one {_how(status)}: what it printed says why"


@contextlib.contextmanager
def noting_failures() -> Iterator[None]:
    """What this worker's start fails with in this block is what the command will tell.

    It counts as a death: another worker may be luckier.
    """
    try:
        yield
    except Exception as exc:
        if place := folder():
            with contextlib.suppress(OSError):  # it is raised on, and printed
                (place / f"{_FAILED}{os.getpid()}").write_text(sentence_of(exc), encoding="utf-8")
        raise


def note_ready() -> None:
    """Note that this worker has loaded its model, or was asked to stop: it has not died of it."""
    if (place := folder()) and place.is_dir():  # the command may have ended first
        (place / f"{_READY}{os.getpid()}").touch()


def is_supervised() -> bool:
    """Whether this is a worker of the command, or the command itself."""
    return folder() is not None


def folder() -> Path | None:
    """The private folder of this run of the command, gone when it ends; None outside of it."""
    place = os.environ.get(FOLDER_VARIABLE)
    return Path(place) if place else None


def planned_workers(configured: int) -> int:
    """How many workers the service has: as the command says, else as configured."""
    return int(os.environ.get(WORKERS_VARIABLE) or configured)


def report_failure(exc: Exception) -> None:
    """Leave the reason and ask the command's process to stop, which prints it; else log it.

    The first reason counts. What nobody foresaw is logged with its traceback as well. With
    `--reload` a failure that a worker reports itself is logged, and the server goes on: the next
    change may mend it.
    """
    if (place := folder()) is None:
        log_load_failure(exc)
        return
    told = sentence_of(exc)
    if not isinstance(exc, MLOpsError):
        told = f"the model cannot be loaded: {told}"
    process_id = int(os.environ[PROCESS_VARIABLE])
    if os.environ.get(RELOAD_VARIABLE) and process_id != os.getpid():
        logger.error("%s; waiting for a change of the code or the model", told)
        return
    try:
        with (place / _REASON).open("x", encoding="utf-8") as file:
            file.write(told)
    except FileExistsError:
        return
    if not isinstance(exc, MLOpsError):
        logger.error("the model could not be loaded; the traceback:", exc_info=exc)
    if process_id != os.getpid():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGTERM)


def _how(status: int) -> str:
    """How a process ended."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"was killed by {name}{' (out of memory?)' if status == -signal.SIGKILL else ''}"


def _failure(reason: Path) -> ServiceError:
    return ServiceError(reason.read_text(encoding="utf-8"), "load_model")


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="mlops-serve-")
    except OSError as exc:
        raise ServiceError(
            f"no temporary folder can be made ({exc}): set TMPDIR to one that can be written",
            "serve",
        ) from exc
