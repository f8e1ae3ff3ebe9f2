"""The log of a served service: what a worker prints, and a file that `bentoml logs` reads.

All workers of a service append to one file, `$BENTOML_HOME/mlops/logs/<service>.log`. It is
bounded: at `MAX_BYTES` it becomes `<service>.log.1`, which replaces the one before. Each line names
the service or Bento that wrote it. Lines are text, or JSON objects where the operator wants that.
A service that cannot write the file serves without it.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from io import TextIOWrapper
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlops.errors import MLOpsError, ServiceError
from mlops.serving.bentoml.http_options import HTTPOptions, LogFormat

if TYPE_CHECKING:
    from bentoml import Service

logger = logging.getLogger(__name__)

MAX_BYTES = 8 * 1024 * 1024

_LOOK_S = 0.25
_NAME = re.compile(r"[A-Za-z0-9]([-._A-Za-z0-9]{0,61}[A-Za-z0-9])?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_LINE = re.compile(r"\S+ [A-Z]+ \[(?P<tag>[^\]]*)\] ")
_FOLLOW_S = 0.25


class _SharedLog(WatchedFileHandler):
    """Appends to a file that other processes append to, and starts a new one when it is full.

    Where the file cannot be written, as on a full disk, lines are missing. Nobody who logs is told:
    they have requests to answer.
    """

    _looked_s = -_LOOK_S
    _num_written = 0
    _is_failing = False

    def try_open(self) -> OSError | None:
        """Open the file; why that fails, if it does, which is then not said again."""
        try:
            self.stream = self._open()
        except OSError as exc:
            self._is_failing = True
            return exc
        return None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._look()
            if self.stream is None:
                self.stream = self._open()
            self.stream.write(self.format(record) + self.terminator)
            self.stream.flush()
        except OSError as exc:
            self._say_once(exc)
            stream, self.stream = self.stream, None
            with contextlib.suppress(OSError):  # with what it could not write
                if stream:
                    stream.close()
        except Exception:
            self.handleError(record)
        else:
            self._is_failing = False

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return super()._open()

    def _look(self) -> None:
        now_s = time.monotonic()
        # To look at the file costs more than to write a line.
        if now_s - self._looked_s >= _LOOK_S or self._num_written >= MAX_BYTES // 64:
            self._looked_s, self._num_written = now_s, 0
            self._turn_over()
            self.reopenIfNeeded()  # another process may have turned it over

    def _say_once(self, exc: OSError) -> None:
        if not self._is_failing:
            self._is_failing = True
            with contextlib.suppress(OSError):
                sys.stderr.write(
                    f"{self.baseFilename} lacks lines until it can be written: {exc.strerror}\n"
                )

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        self._num_written += len(line)
        return line

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

    _second = (0, "")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        second, text = self._second
        if second != int(record.created):  # to format a time costs as much as the rest of the line
            text = super().formatTime(record, datefmt)
            self._second = (int(record.created), text)
        return text

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        text = super().formatMessage(record)
        if text.isprintable():
            return text
        return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


class _JSONLines(logging.Formatter):
    """An object on each line; the fields of a request are its own."""

    def __init__(self, tag: str) -> None:
        super().__init__()
        self._tag = tag

    def format(self, record: logging.LogRecord) -> str:
        request: Any = record.msg if hasattr(record.msg, "fields") else None  # a `RequestLine`
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "service": self._tag,
            "process": record.process,
            "message": request.summary if request else record.getMessage(),
            **(request.fields if request else {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(service: Service[Any]) -> None:
    """Let this process print what we log, a line for each request too; as JSON if so wanted.

    Called in a worker, whose handlers BentoML has made.
    """
    from bentoml._internal.configuration import get_quiet_mode

    if not get_quiet_mode():
        logging.getLogger("mlops").setLevel(logging.INFO)
    # It would make up a line for each request that nobody gets to see.
    logging.getLogger("uvicorn.access").propagate = False
    if _wants_json(service):
        for name in ("", "bentoml", "uvicorn.error", "circus"):
            for handler in logging.getLogger(name).handlers:
                handler.setFormatter(_JSONLines(_tag_of(service)))


def attach(service: Service[Any]) -> None:
    """Let what this worker logs also go to the service's log."""
    handler = _make_handler(service)
    handler.try_open()  # where it fails, the command has said so
    logging.getLogger("mlops").setLevel(logging.INFO)
    root, bentoml = logging.getLogger(), logging.getLogger("bentoml")
    for one in (root,) if bentoml.propagate else (root, bentoml):
        if not any(isinstance(other, _SharedLog) for other in one.handlers):
            one.addHandler(handler)


@contextlib.contextmanager
def of_command(service: Service[Any]) -> Iterator[None]:
    """In this block what the command logs also goes to the service's log.

    What the block fails with goes there alone: the command line prints it.
    """
    logger.disabled = False  # BentoML has silenced those that it does not know
    handler = _make_handler(service)
    if exc := handler.try_open():
        logger.warning("nothing is kept for `bentoml logs`: %s", exc)
    ours = logging.getLogger("mlops")
    ours.addHandler(handler)
    try:
        yield
    except MLOpsError as exc:
        handler.handle(logger.makeRecord(logger.name, logging.ERROR, "", 0, str(exc), (), None))
        raise
    finally:
        ours.removeHandler(handler)
        handler.close()


def _make_handler(service: Service[Any]) -> _SharedLog:
    path = path_of(service.name)
    handler = _SharedLog(path, encoding="utf-8", delay=True, errors="backslashreplace")
    tag = _tag_of(service)
    text = f"%(asctime)s %(levelname)s [{tag}] %(process)d %(name)s: %(message)s"
    handler.setFormatter(
        _JSONLines(tag) if _wants_json(service) else _OneLine(text, "%Y-%m-%dT%H:%M:%S%z")
    )
    return handler


def _wants_json(service: Service[Any]) -> bool:
    options: HTTPOptions | None = getattr(service, "http_options", None)
    return options is not None and options.log_format == LogFormat.JSON


def _tag_of(service: Service[Any]) -> str:
    return str(service.bento.tag) if service.bento else str(service.name)


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
        ServiceError: the service has no log, or it cannot be read.
    """
    path, wanted = _log_of(tag)
    lines: list[str] = []
    for file in (previous(path), path):
        try:
            lines += file.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            continue
        except OSError as exc:
            raise ServiceError(f"the log of {tag!r} cannot be read: {exc}", "logs") from exc
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
        if wanted is not None and (tag := _tag_in(line)):
            is_chosen = tag == wanted  # the lines of a traceback go with the one above
        if is_chosen:
            yield line


def _tag_in(line: str) -> str | None:
    """Who wrote a line; None for one that goes on with the line above."""
    if found := _LINE.match(line):
        return found["tag"]
    if line.startswith('{"time": '):
        try:
            return str(json.loads(line)["service"])
        except (ValueError, KeyError):  # cut off by a process that was killed
            return None
    return None


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
