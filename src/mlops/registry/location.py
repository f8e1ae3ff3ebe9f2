"""Files in a folder or behind a URL that fsspec knows, and every failure there as our own error.

A file appears whole or not at all: object stores do so, and in a folder it gets its name last.
What a killed writer leaves in a folder, the next one removes (`Location.sweep`). What it leaves of
an upload in parts, an object store removes by its own rules, where such a rule is set.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import platform
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from mlops.errors import MissingDependencyError, PackagingError
from mlops.registry.blobs import Progress
from mlops.registry.readers import EVERYONE, GROUP, open_private, readers_of, readers_of_copies

logger = logging.getLogger(__name__)

ABANDONED_AFTER_S = 3600
"""How long nothing is written to a file without a name until its writer, on another machine, counts
as gone."""

_PARTIAL = re.compile(r"partial-[0-9a-f]{32}(@.*)?")
_CHUNK_BYTES = 8 * 2**20
_NUM_ATTEMPTS = 3


class Location:
    """A folder, such as one on NFS, or a URL, such as `s3://bucket/prefix`.

    Paths are relative to it. Each method raises `PackagingError` when the place refuses or cannot
    be reached; reading is tried three times.

    Attributes:
        name: the location as it may be shown, without passwords.

    Raises:
        PackagingError: there can be no such place.
        MissingDependencyError: the library for this kind of URL is not installed.
    """

    def __init__(self, location: str) -> None:
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        self.name = without_secrets(location)
        if not location:
            raise self._refusal(ValueError("no path and no URL is given"))
        try:
            self._files, self._root = url_to_fs(location, use_listings_cache=False)
        except Exception as exc:
            if isinstance(exc, ImportError) and "s3fs" in str(exc):
                raise MissingDependencyError("s3fs", "s3") from exc
            raise self._refusal(exc) from exc
        self._is_folder = isinstance(self._files, LocalFileSystem)

    def size(self, path: str) -> int | None:
        """Bytes of a regular file; None when there is none. Links are not followed."""
        info = self._try(self._info, f"{self._root}/{path}")
        if info is None or info["type"] != "file" or info.get("islink"):
            return None
        size: int | None = info["size"]
        return size

    def read(self, path: str, size: int) -> Iterator[bytes]:
        """The first `size` bytes of a file, in pieces; fewer when it has fewer."""
        for start in range(0, size, _CHUNK_BYTES):
            end = min(start + _CHUNK_BYTES, size)
            yield self._try(self._files.cat_file, f"{self._root}/{path}", start=start, end=end)

    def local_path(self, path: str) -> Path | None:
        """Where a file is on this machine; None at an object store."""
        return Path(self._root, path) if self._is_folder else None

    def readers_of_copies(self, sources: Iterable[Path]) -> int:
        """Who may read copies of local files here (`readers.py`)."""
        if not self._is_folder:
            return EVERYONE
        with self._translated():
            return readers_of_copies(sources, self._new_folder)

    def is_open_to(self, readers: int, path: str) -> bool:
        """True when at least these readers may read a file that is here."""
        local = self.local_path(path)
        if local is None:
            return True
        with self._translated():
            status = local.stat()
            found = readers_of(status)
            if found == EVERYONE or readers & ~found:
                return found == EVERYONE
            # Others' modes are alike: it is for their owner alone, or for another group.
            if readers == GROUP:
                return status.st_gid == self._new_folder.st_gid
            return os.access(local, os.R_OK)

    def is_own(self, path: str) -> bool:
        """True when a file that is here is this user's, or nobody's in particular."""
        local = self.local_path(path)
        with self._translated():
            return local is None or local.stat().st_uid == os.geteuid()

    def upload(
        self, source: Path, path: str, readers: int, progress: Progress | None = None
    ) -> None:
        """Copy a local file there, in place of one that has the path already."""
        tell = progress or (lambda _: None)
        with self._translated():
            if self._is_folder:
                with source.open("rb") as reader, self._unnamed(path) as (unnamed, writer):
                    while chunk := reader.read(_CHUNK_BYTES):
                        writer.write(chunk)
                        tell(len(chunk))
                    _finish(writer, readers)
                    unnamed.replace(f"{self._root}/{path}")
            else:
                self._files.put_file(str(source), f"{self._root}/{path}", callback=_callback(tell))

    def create(self, path: str, content: bytes, readers: int) -> None:
        """Write a file unless it is there: of several writers one wins, and each may look who."""
        with self._translated(), contextlib.suppress(FileExistsError):
            if self._is_folder:
                with self._unnamed(path) as (unnamed, writer):
                    writer.write(content)
                    _finish(writer, readers)
                    _link(unnamed, Path(self._root, path))
            else:
                self._files.pipe_file(f"{self._root}/{path}", content, mode="create")

    def sweep(self) -> None:
        """Remove from a folder what writers left that are gone.

        A writer locks its file. One of this machine that is not locked has no writer any more. Not
        every file system tells of another machine's locks: there it is one to which nothing was
        written for an hour, by the file system's own clock. A writer that loses its file fails.
        """
        if not self._is_folder:
            return
        with self._translated():
            left = [
                path
                for folder in ("blobs", "index")  # what else lies there is not ours
                for path in Path(self._root, folder).rglob("partial-*")
                if _is_partial(path)
            ]
            if not left:
                return
            with self._unnamed("blobs/now") as (unnamed, _):
                now_s = unnamed.stat().st_mtime
            for path in left:
                try:
                    _remove_abandoned(path, now_s)
                except OSError as exc:
                    if _is_old(path, now_s):
                        logger.warning("%s, which a killed writer left, stays: %s", path, exc)

    @cached_property
    def _new_folder(self) -> os.stat_result:
        """The status of a folder that is made here: shows what the umask and the place allow."""
        folder = Path(self._root, f"new-{uuid.uuid4().hex}")
        folder.mkdir(parents=True)
        try:
            return folder.stat()
        finally:
            folder.rmdir()

    def _info(self, path: str) -> dict[str, Any] | None:
        try:
            info: dict[str, Any] = self._files.info(path)
        except FileNotFoundError:
            return None
        return info

    @contextlib.contextmanager
    def _unnamed(self, path: str) -> Iterator[tuple[Path, BinaryIO]]:
        """A locked file that no reader knows, in the folder of `path`; gone afterwards."""
        folder = Path(self._root, path).parent
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            unnamed = folder / f"partial-{uuid.uuid4().hex}@{_machine()}"
            with open(unnamed, "xb", opener=open_private) as writer:
                try:
                    with contextlib.suppress(OSError):  # some file systems have no locks
                        fcntl.flock(writer, fcntl.LOCK_EX)
                    if unnamed.exists():  # otherwise somebody swept before it was locked
                        yield unnamed, writer
                        return
                finally:
                    unnamed.unlink(missing_ok=True)

    def _try(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        failure: Exception | None = None
        for _ in range(_NUM_ATTEMPTS):
            try:
                return call(*arguments, **options)
            except Exception as exc:
                failure = exc
        raise self._refusal(failure) from failure

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except Exception as exc:
            raise self._refusal(exc) from exc

    def _refusal(self, exc: Exception | None) -> PackagingError:
        reason = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
        return PackagingError(
            f"the shared store at {self.name} cannot be used: "
            f"{without_secrets(' '.join(str(reason).split()))}; check that it is there and that "
            "this user may use it",
            "use_location",
            {"location": self.name},
        )


def without_secrets(text: str) -> str:
    """The URLs in a text lose their passwords and queries."""
    text = re.sub(r"://[^/\s]*@", "://", text)
    return re.sub(r"(://[^\s?#]*)[?#]\S*", r"\1", text)


def _machine() -> str:
    """This machine's name, as part of a file's."""
    return re.sub(r"[^A-Za-z0-9.-]", "-", platform.node())


def _is_partial(path: Path) -> bool:
    return _PARTIAL.fullmatch(path.name) is not None and path.is_file() and not path.is_symlink()


def _remove_abandoned(partial: Path, now_s: float) -> None:
    """Remove a file without a name if its writer is gone."""
    with contextlib.suppress(FileNotFoundError), partial.open("r+b") as file:
        if partial.name.partition("@")[2] == _machine():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            except OSError:
                pass  # no locks here: its age tells
            else:
                partial.unlink()  # while it is locked: a writer that waits for it will notice
                return
        if _is_old(partial, now_s):
            partial.unlink()


def _is_old(partial: Path, now_s: float) -> bool:
    """Whether nothing was written to a file for so long that its writer counts as gone."""
    try:
        return now_s - partial.stat().st_mtime > ABANDONED_AFTER_S
    except FileNotFoundError:
        return False


def _finish(writer: BinaryIO, readers: int) -> None:
    writer.flush()
    os.fchmod(writer.fileno(), readers | 0o200)


def _link(source: Path, target: Path) -> None:
    """Give a file another name, if that is free; replace what has it where links cannot be."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        source.replace(target)


def _callback(tell: Progress) -> Any:
    """What fsspec calls with all bytes so far: `tell` hears of the new ones."""
    from fsspec.callbacks import Callback

    told = 0

    def hear(size: int | None, value: int, **_: Any) -> None:
        nonlocal told
        tell(value - told)
        told = value

    return Callback(hooks={"hear": hear})
