"""File contents by their SHA-256, each stored once.

A blob is written with a name that no reader knows and then linked to its own: it is whole or not
there. An entry of the model store links to blobs, so adapters share their base, versions share what
did not change, and packaging the same weights again writes nothing.

An entry and its blobs are one file to the file system, with one mode. So the same content for other
readers (`readers.py`) is another blob: nobody's entry becomes readable, or unreadable, by another.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from mlops.errors import PackagingError
from mlops.registry.manifest import StoredFile
from mlops.registry.readers import EVERYONE, open_private

Progress = Callable[[int], None]
"""Called with the number of bytes that were just read."""

_BUFFER_BYTES = 256 * 1024
_CHUNK_BYTES = 32 * 1024 * 1024
_FICLONE = 0x40049409  # linux/fs.h: share the extents of another file (btrfs, XFS, bcachefs)
_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EACCES, errno.ENOSYS}


def hash_file(path: Path, progress: Progress | None = None) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    with path.open("rb", buffering=0) as file:
        while num_read := file.readinto(buffer):
            digest.update(buffer[:num_read])
            if progress:
                progress(num_read)
    return digest.hexdigest()


class BlobStore:
    """Blobs under one folder, named `<size>-<sha256>`; `-<mode>` follows where not all may read.

    Args:
        folder: made when the first blob is added; on the file system of the model store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, file: StoredFile, readers: int) -> Path:
        """Where the blob with this content for these readers is, or would be."""
        suffix = "" if readers == EVERYONE else f"-{readers:o}"
        return self.folder / f"{file.blob_name}{suffix}"

    def add(
        self, source: Path, relative_path: str, readers: int, progress: Progress | None = None
    ) -> StoredFile:
        """Make sure that the content of `source` is stored, for these readers.

        A blob of the same size is a hint that nothing needs to be written: then the source is
        hashed first. Otherwise it is copied and hashed in one pass, or cloned where the file
        system shares extents.

        Raises:
            PackagingError: the source changed meanwhile, the disk is full or not writable.
        """
        try:
            before = source.stat()
            self.folder.mkdir(parents=True, exist_ok=True)
            stored = self._add(source, relative_path, readers, before.st_size, progress)
            after = source.stat()
        except OSError as exc:
            raise store_failure(exc, self.folder, source) from exc
        if stored.size != before.st_size or after.st_mtime_ns != before.st_mtime_ns:
            raise PackagingError(
                f"{source} changed while it was packaged; try again when it is complete",
                "create_bento_model",
                {"path": str(source)},
            )
        return stored

    def _add(
        self,
        source: Path,
        relative_path: str,
        readers: int,
        size: int,
        progress: Progress | None,
    ) -> StoredFile:
        if any(self.folder.glob(f"{size}-*")):
            file = StoredFile(relative_path, size, hash_file(source, progress))
            if self.holds(file, readers):
                return file
            progress = None  # these bytes were counted
        with self._partial() as partial:
            file = StoredFile(relative_path, *_copy(source, partial, progress))
            partial.chmod(readers)
            if not self.holds(file, readers):
                partial.replace(self.path(file, readers))
        return file

    def try_receive(
        self,
        file: StoredFile,
        readers: int,
        chunks: Iterable[bytes],
        progress: Progress | None = None,
    ) -> bool:
        """Store content that comes in pieces; False, and nothing stored, when it is not `file`'s.

        No more bytes are written than `file` has.

        Raises:
            PackagingError: the disk is full or not writable.
        """
        digest = hashlib.sha256()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._partial() as partial:
                with open(partial, "xb", opener=open_private) as writer:
                    for chunk in chunks:
                        if writer.tell() + len(chunk) > file.size:
                            return False
                        writer.write(chunk)
                        digest.update(chunk)
                        if progress:
                            progress(len(chunk))
                    if writer.tell() != file.size or digest.hexdigest() != file.sha256:
                        return False
                partial.chmod(readers)
                partial.replace(self.path(file, readers))
        except OSError as exc:
            raise store_failure(exc, self.folder) from exc
        return True

    @contextlib.contextmanager
    def _partial(self) -> Iterator[Path]:
        """A name that no reader knows; what has it afterwards is removed."""
        partial = self.folder / f"partial-{uuid.uuid4().hex}"
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)

    def holds(self, file: StoredFile, readers: int) -> bool:
        """True when the blob is stored and its bytes are still what its name says."""
        blob = self.path(file, readers)
        try:
            return blob.stat().st_size == file.size and hash_file(blob) == file.sha256
        except (FileNotFoundError, PermissionError):  # another user's private one is not ours
            return False

    def link(self, file: StoredFile, readers: int, target: Path) -> None:
        """Make `target` the content of `file`: a hard link, or a clone or copy where links fail."""
        blob = self.path(file, readers)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(blob, target)
        except OSError as exc:
            if exc.errno not in _CANNOT_LINK:
                raise
            _copy(blob, target, None)
            target.chmod(readers)

    def sweep(self) -> None:
        """Remove partial writes and blobs that no entry links to.

        Only safe while nobody adds: the caller holds the store's lock alone.
        """
        with contextlib.suppress(FileNotFoundError):
            for blob in self.folder.iterdir():
                if blob.stat().st_nlink == 1:
                    blob.unlink()


def store_failure(exc: OSError, folder: Path, source: Path | None = None) -> PackagingError:
    """Say what an operating system's refusal means for the user who is packaging."""
    details = {"path": str(exc.filename or folder), "errno": errno.errorcode.get(exc.errno or 0)}
    if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
        message = f"no space left on the disk of {folder}; free some and try again"
    elif exc.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        if source is not None and str(exc.filename) == str(source):
            message = f"{source} cannot be read; allow this user to read it"
        else:
            message = f"the model store at {folder} cannot be written; allow it or set BENTOML_HOME"
    elif exc.errno == errno.ENOENT and source is not None:
        message = f"{source} vanished while it was packaged; try again when it is complete"
    elif exc.errno == errno.ENOENT:
        message = (
            f"something of the model store at {folder} was deleted while it was used; run the same "
            "again"
        )
    else:
        message = f"the model store at {folder} refused the files: {exc.strerror or exc}"
    return PackagingError(message, "create_bento_model", details)


def _copy(source: Path, target: Path, progress: Progress | None) -> tuple[int, str]:
    """Copy or clone `source` to the new file `target`; returns its size and SHA-256.

    A second thread hashes what has arrived in `target` while the kernel copies on. So the digest is
    that of the stored bytes, whatever happens to the source meanwhile.
    """
    with (
        source.open("rb", buffering=0) as reader,
        open(target, "x+b", buffering=0, opener=open_private) as writer,
    ):
        if _clone(reader, writer):
            return target.stat().st_size, hash_file(target, progress)
        digest = hashlib.sha256()
        size = 0

        def hash_chunk(start: int, length: int) -> None:
            with mmap.mmap(writer.fileno(), length, offset=start, access=mmap.ACCESS_READ) as chunk:
                digest.update(chunk)
            if progress:
                progress(length)

        with ThreadPoolExecutor(1) as hasher:
            hashed = []
            while num_copied := _copy_chunk(reader, writer):
                hashed.append(hasher.submit(hash_chunk, size, num_copied))
                size += num_copied
            for chunk in hashed:
                chunk.result()
        return size, digest.hexdigest()


def _copy_chunk(reader: BinaryIO, writer: BinaryIO) -> int:
    """Append the next chunk of `reader` to `writer`; returns its bytes, 0 at the end.

    Every chunk but the last has `_CHUNK_BYTES`, so that chunks begin at multiples of a page.
    """
    copied = 0
    while copied < _CHUNK_BYTES:
        wanted = _CHUNK_BYTES - copied
        if sys.platform == "linux":
            num_bytes = os.sendfile(writer.fileno(), reader.fileno(), None, wanted)
        else:
            num_bytes = writer.write(reader.read(min(wanted, _BUFFER_BYTES)))
        if not num_bytes:
            break
        copied += num_bytes
    return copied


def _clone(reader: BinaryIO, writer: BinaryIO) -> bool:
    """Share the extents of `reader` with the empty `writer` where the file system can."""
    if sys.platform == "linux":
        import fcntl

        try:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
        except OSError:
            return False
        return True
    elif sys.platform == "darwin":  # noqa: RET505 - mypy follows this form
        import ctypes

        # clonefile(2) wants a name that is free: clone beside, then take the place of `writer`.
        target = Path(str(writer.name))
        clone = target.with_name(target.name + ".clone")
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.clonefile(os.fsencode(str(reader.name)), os.fsencode(str(clone)), 0) != 0:
            return False
        clone.replace(target)
        return True
    else:
        return False
