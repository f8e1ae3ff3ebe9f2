"""The log of a served service: `$BENTOML_HOME/mlops/logs/<service>.log`, read by `bentoml logs`.

All workers of a service append to one file. It is bounded: at `MAX_BYTES` it becomes
`<service>.log.1`, which replaces the one before. Each line names the service or Bento that wrote
it.
"""

from __future__ import annotations

import fcntl
import logging
import re
import time
from collections.abc import Iterator
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlops.errors import ServiceError

if TYPE_CHECKING:
    from bentoml import Service

MAX_BYTES = 8 * 1024 * 1024

_NAME = re.compile(r"[A-Za-z0-9]([-._A-Za-z0-9]{0,61}[A-Za-z0-9])?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_LINE = re.compile(r"\S+ [A-Z]+ \[(?P<tag>[^\]]*)\] ")
_FOLLOW_S = 0.25


class _SharedLog(WatchedFileHandler):
    """Appends to a file that other processes append to, and starts a new one when it is full."""

    def emit(self, record: logging.LogRecord) -> None:
        self._turn_over()
        super().emit(record)  # opens the file anew when another process has turned it over

    def _turn_over(self) -> None:
        path = Path(self.baseFilename)
        if not path.exists() or path.stat().st_size < MAX_BYTES:
            return
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists() and path.stat().st_size >= MAX_BYTES:
                path.replace(previous(path))


class _OneLine(logging.Formatter):
    """A message stays on its line, whatever a client put into it; tracebacks have several."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        text = super().formatMessage(record)
        return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def attach(service: Service[Any]) -> None:
    """Let what this process logs also go to the service's log."""
    path = path_of(service.name)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    tag = str(service.bento.tag) if service.bento else service.name
    handler = _SharedLog(path, encoding="utf-8", delay=True)
    handler.setFormatter(
        _OneLine(
            f"%(asctime)s %(levelname)s [{tag}] %(process)d %(name)s: %(message)s",
            "%Y-%m-%dT%H:%M:%S%z",
        )
    )
    logging.getLogger("mlops").setLevel(logging.INFO)
    root, bentoml = logging.getLogger(), logging.getLogger("bentoml")
    for logger in (root,) if bentoml.propagate else (root, bentoml):
        if not any(isinstance(other, _SharedLog) for other in logger.handlers):
            logger.addHandler(handler)


def path_of(service_name: str) -> Path:
    """Where the log of a service is.

    Raises:
        ServiceError: the name is none that a service can have.
    """
    from bentoml._internal.configuration.containers import BentoMLContainer

    if not _NAME.fullmatch(service_name):
        raise ServiceError(
            f"{service_name!r} is not the name of a service: use NAME or NAME:VERSION", "logs"
        )
    home = BentoMLContainer.bentoml_home.get()
    return Path(home, "mlops", "logs", f"{service_name.lower()}.log")


def previous(path: Path) -> Path:
    """The file that a full log became."""
    return path.with_name(f"{path.name}.1")


def read(tag: str, num_lines: int | None = None) -> list[str]:
    """The last lines of a service's log.

    Args:
        tag: the service's name, which with `:latest` means everything that it logged; with another
            version, only what the Bento of that version logged.

    Raises:
        ServiceError: the service has no log.
    """
    path, wanted = _log_of(tag)
    lines: list[str] = []
    for file in (previous(path), path):
        if file.exists():
            lines += file.read_text(encoding="utf-8", errors="replace").splitlines()
    chosen = list(_of_tag(lines, wanted))
    return chosen if num_lines is None else chosen[max(0, len(chosen) - num_lines) :]


def follow(tag: str) -> Iterator[str]:
    """Lines as they are written from now on; never ends.

    Raises:
        ServiceError: the service has no log.
    """
    path, wanted = _log_of(tag)
    return _of_tag(_new_lines(path), wanted)


def _log_of(tag: str) -> tuple[Path, str | None]:
    name, _, version = tag.partition(":")
    path = path_of(name)
    if not path.exists() and not previous(path).exists():
        raise ServiceError(
            f"there is no log of {name!r}: it is written once the service has run here ({path})",
            "logs",
            {"path": str(path)},
        )
    return path, f"{name.lower()}:{version}" if version not in ("", "latest") else None


def _of_tag(lines: Any, wanted: str | None) -> Iterator[str]:
    is_chosen = wanted is None
    for line in lines:
        if wanted is not None and (found := _LINE.match(line)):
            is_chosen = found["tag"] == wanted  # the lines of a traceback go with the one above
        if is_chosen:
            yield line


def _new_lines(path: Path) -> Iterator[str]:
    position = path.stat().st_size if path.exists() else 0
    inode = path.stat().st_ino if path.exists() else None
    rest = ""
    while True:
        if path.exists():
            with path.open(encoding="utf-8", errors="replace") as file:
                found = path.stat()
                if found.st_ino != inode or found.st_size < position:
                    position, inode = 0, found.st_ino
                file.seek(position)
                rest += file.read()
                position = file.tell()
        *lines, rest = rest.split("\n")
        yield from lines
        time.sleep(_FOLLOW_S)
