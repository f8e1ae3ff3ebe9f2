"""A folder for the metrics of each server, in place of BentoML's one for all that a store has.

BentoML empties its folder whenever a server starts, also one that fails at once. Then a service
that runs has no metrics any more, and two tell of each other's. Ours lie in
`$BENTOML_HOME/mlops/metrics`, one for each server; all of its workers hold a lock on it. The last
of its processes removes it, which with our command is the command. When that was killed, the next
worker of another server does.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from mlops.serving.bentoml import supervision
from mlops.serving.http.prometheus import METRICS_FOLDER_VARIABLE

logger = logging.getLogger(__name__)

STARTING_S = 300.0
"""A folder that is younger may be one whose workers are about to come."""


def give_own_metrics_folder() -> None:
    """Let a server that this process starts use a new folder; BentoML makes it then."""
    from bentoml._internal.configuration.containers import BentoMLContainer

    folder = _root() / f"{os.getpid()}-{secrets.token_hex(4)}"
    BentoMLContainer.prometheus_multiproc_dir.set(str(folder))
    atexit.register(_leave, folder)  # for a server that has failed before its workers came


def hold_own_metrics_folder() -> None:
    """In a worker: keep the server's folder for as long as this process runs."""
    folder = Path(os.environ.get(METRICS_FOLDER_VARIABLE, ""))
    if folder.parent != _root():
        return  # there is none, or somebody else has chosen it
    try:
        with _root_locked():
            folder.mkdir(mode=0o700, exist_ok=True)
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_SH)
            for other in set(_root().iterdir()) - {folder}:
                with contextlib.suppress(OSError):  # another user's
                    if time.time() - other.stat().st_mtime > STARTING_S:
                        _remove_unless_held(other)
    except OSError as exc:
        logger.warning("the folder of the metrics cannot be held: %s", exc)
        return
    # The command's workers leave it to the command: those that come after them need it.
    if not supervision.is_supervised():
        atexit.register(_leave, folder, lock)


def _leave(folder: Path, lock: int | None = None) -> None:
    if not folder.is_dir():
        return
    with contextlib.suppress(OSError), _root_locked():
        if lock is not None:
            os.close(lock)
        _remove_unless_held(folder)


def _remove_unless_held(folder: Path) -> None:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)


def _root() -> Path:
    from bentoml._internal.configuration.containers import BentoMLContainer

    return Path(BentoMLContainer.bentoml_home.get(), "mlops", "metrics").absolute()


@contextlib.contextmanager
def _root_locked() -> Iterator[None]:
    _root().mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(_root(), os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
