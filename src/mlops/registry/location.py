"""Files in a folder or behind a URL that fsspec knows, and every failure there as our own error.

A file appears whole or not at all: object stores do so, and in a folder it gets its name last.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlops.errors import MissingDependencyError, PackagingError
from mlops.registry.blobs import Progress

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

    def upload(self, source: Path, path: str, progress: Progress | None = None) -> None:
        """Copy a local file there, in place of one that has the path already."""
        tell = progress or (lambda _: None)
        with self._translated():
            if self._is_folder:
                with self._unnamed(path) as unnamed:
                    shutil.copyfile(source, unnamed)
                    unnamed.replace(f"{self._root}/{path}")
                tell(source.stat().st_size)
            else:
                self._files.put_file(str(source), f"{self._root}/{path}", callback=_callback(tell))

    def create(self, path: str, content: bytes) -> None:
        """Write a file unless it is there: of several writers one wins, and each may look who."""
        with self._translated(), contextlib.suppress(FileExistsError):
            if self._is_folder:
                with self._unnamed(path) as unnamed:
                    unnamed.write_bytes(content)
                    _link(unnamed, Path(self._root, path))
            else:
                self._files.pipe_file(f"{self._root}/{path}", content, mode="create")

    def _info(self, path: str) -> dict[str, Any] | None:
        try:
            info: dict[str, Any] = self._files.info(path)
        except FileNotFoundError:
            return None
        return info

    @contextlib.contextmanager
    def _unnamed(self, path: str) -> Iterator[Path]:
        """A file that no reader knows, in the folder of `path`; gone afterwards."""
        folder = Path(self._root, path).parent
        folder.mkdir(parents=True, exist_ok=True)
        unnamed = folder / f"partial-{uuid.uuid4().hex}"
        try:
            yield unnamed
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
