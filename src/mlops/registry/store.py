"""The model store: BentoML's own, written atomically and with every byte accounted for.

An entry is `models/<name>/<version>/` as BentoML lays it out, so `bentoml models list` and
`bentoml.models.get` work on it. How one comes to be:

1. the files become blobs (`blobs.py`), written and hashed once;
2. the entry is put together in a staging folder: links to the blobs, manifest, `model.yaml`;
3. one `rename` to its final place makes it appear. That call fails if the place is taken, so of
   many writers of one tag exactly one wins;
4. the `latest` pointer is replaced.

A writer holds the store's lock shared. One that gets it alone first sweeps what a killed writer
left behind. Who deletes takes no lock: what vanishes meanwhile becomes one sentence (`reading`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import stat
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from mlops.errors import IntegrityError, PackagingError
from mlops.registry import tags
from mlops.registry.blobs import BlobStore, Progress, hash_file, store_failure
from mlops.registry.manifest import (
    FILE_NAME,
    Manifest,
    StoredFile,
    is_portable,
    read_manifest,
)
from mlops.registry.model_yaml import plain, read_yaml, write_model_yaml
from mlops.registry.readers import (
    EVERYONE,
    GROUP,
    OWNER,
    readers_of,
    readers_of_copies,
    restrict,
)

logger = logging.getLogger(__name__)

RESERVED_NAMES = frozenset({"model.yaml", FILE_NAME})
"""Names at the root of an entry that are not the model's own."""

WAIT_FOR_WRITERS_S = 5.0

_OPERATION = "create_bento_model"


@dataclass(frozen=True)
class StoredModel:
    """One entry of the model store.

    Attributes:
        tag: `name:version`.
        path: the entry's folder; the model's files lie in it under their own relative paths.
        created: False when the same content was already stored under this tag.
    """

    tag: str
    path: Path
    manifest: Manifest
    labels: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    created: bool = False

    @property
    def digest(self) -> str:
        """Digest of the entry's content."""
        return self.manifest.digest

    @property
    def reference(self) -> str:
        """Tag and digest, `name:version@sha256:…`: this content and no other."""
        return f"{self.tag}@{self.digest}"

    @property
    def name(self) -> str:
        """The part of the tag before the colon."""
        return self.tag.partition(":")[0]

    @property
    def version(self) -> str:
        """The part of the tag after the colon."""
        return self.tag.partition(":")[2]


@dataclass(frozen=True)
class Garbage:
    """Files of the store that no entry uses: blobs, and what killed writers left."""

    num_files: int = 0
    num_bytes: int = 0


def default_version(digest: str) -> str:
    """The version of content that was given none: the first 12 digits of its digest."""
    return digest.removeprefix("sha256:")[:12]


class ModelStore:
    """BentoML's model store of this process (`BENTOML_HOME`, or a Bento's own in a container)."""

    def __init__(self) -> None:
        try:
            self.models, self.bentos = _folders()
        except (OSError, RuntimeError) as exc:
            raise PackagingError(
                f"the model store cannot be opened: {exc}; allow writing there or set BENTOML_HOME",
                _OPERATION,
                {"path": os.environ.get("BENTOML_HOME", "~/bentoml")},
            ) from exc
        self.private = self.models.parent / "mlops"
        self.blobs = BlobStore(self.private / "blobs")

    def save(
        self,
        name: str,
        version: str | None,
        files: Iterable[tuple[str, Path]],
        *,
        kind: str,
        framework: str,
        base: StoredModel | None = None,
        labels: Mapping[str, str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        reuse: bool = False,
        check: Callable[[Path], None] | None = None,
    ) -> StoredModel:
        """Store files as the entry `name:version`.

        Args:
            name, version: valid parts of a tag; a version of None is made from the digest.
            files: pairs of relative POSIX path and the file to read.
            base: entry of the base model, for an adapter.
            labels, metadata: for people and searches; not part of the content. An entry that
                exists keeps its own.
            progress: called with each number of bytes read.
            reuse: an entry of any other tag with the same content will do.
            check: called with the entry's folder before it appears; what it raises keeps it out.

        Returns:
            The entry; its `created` is False when the same content was there already.

        Raises:
            PackagingError: other content has this tag, or the store refused; nothing is left over.
        """
        files = list(files)
        with self.writing():
            try:
                readers = self.readers_of_copies(path for _, path in files)
                manifest = Manifest(
                    self._store_files(files, readers, progress),
                    kind,
                    framework,
                    base_digest=base.digest if base else None,
                    base_tag=base.tag if base else None,
                )
                if reuse and (same := self.find(manifest.digest)):
                    self._mend(same, readers)
                    return same
                tag = f"{name}:{version or default_version(manifest.digest)}"
                kept = self._keep(tag, manifest, labels, metadata, readers)
                return kept or self._create(
                    tag, manifest, labels, metadata, readers=readers, check=check
                )
            except OSError as exc:
                raise store_failure(exc, self.models) from exc

    def install(
        self,
        tag: str,
        manifest: Manifest,
        labels: Mapping[str, str],
        metadata: Mapping[str, Any],
        readers: int,
    ) -> StoredModel:
        """Make the entry whose blobs, for `readers`, are in the store already, or mend it.

        Raises:
            PackagingError: other content has this tag, or the store refused; nothing is left over.
        """
        with self.writing(sweep=False):
            try:
                kept = self._keep(tag, manifest, labels, metadata, readers)
                return kept or self._create(tag, manifest, labels, metadata, readers=readers)
            except OSError as exc:
                raise store_failure(exc, self.models) from exc

    def has(self, tag: str) -> bool:
        """True when an entry has this tag, and this user may look at it."""
        return os.path.isfile(self._place(tag) / "model.yaml")  # noqa: PTH113 - Path's may raise

    def get(self, tag: str) -> StoredModel:
        """The entry with this tag; `name` and `name:latest` mean the newest one.

        Raises:
            PackagingError: there is none.
            IntegrityError: its manifest is missing or damaged.
        """
        name, _, version = tag.partition(":")
        valid = tags.is_tag(tag)
        if valid and version in {"", "latest"}:
            version = self._latest(name) or ""
        full_tag = f"{name}:{version}"
        if valid and version and self.has(full_tag):
            try:
                return self._read(full_tag)
            except IntegrityError:
                if self.has(full_tag):
                    raise  # otherwise it was deleted just now
        place = self._place(full_tag)
        hidden = valid and version and place.is_dir() and not os.access(place, os.R_OK | os.X_OK)
        raise PackagingError(
            f"this user may not read {tag} in the store at {self.models}; let its owner allow it"
            if hidden
            else f"no model {tag!r} in the store at {self.models}; `mlops models list` shows what "
            "there is",
            "get_model",
            {"tag": tag, "store": str(self.models)},
        )

    def list(self) -> list[StoredModel]:
        """Every entry that this toolkit made, ordered by tag. Others in the store are left out.

        So is what this user may not read, and one that cannot be read, with a warning in the log.
        """
        entries = []
        for tag in self._tags():
            manifest = self._place(tag) / FILE_NAME
            if not os.path.lexists(manifest):
                continue
            try:
                entries.append(self._read(tag))
            except IntegrityError as exc:
                if os.path.lexists(manifest):  # otherwise it was deleted just now
                    logger.warning("%s", exc)
        return entries

    def find(self, digest: str) -> StoredModel | None:
        """Some entry with this content, or None."""
        for tag in self._tags():
            with contextlib.suppress(IntegrityError):  # what cannot be read is not this content
                if read_manifest(self._place(tag)).digest == digest:
                    return self._read(tag)
        return None

    def _place(self, tag: str) -> Path:
        return self.models / tag.replace(":", "/")

    def _tags(self) -> Iterator[str]:
        """The tags of all folders where entries may be, ordered."""
        for name in _names_in(self.models):
            for version in _names_in(self.models / name):
                yield f"{name}:{version}"

    def verify(self, entry: StoredModel, digest: str | None = None) -> None:
        """Check every byte of an entry against its manifest, and that against `digest`.

        Raises:
            IntegrityError: a file is missing, added or changed, or the digest is another.
        """
        with reading(entry.tag):
            self._verify(replace(entry, manifest=read_manifest(entry.path)), digest)

    def _verify(self, entry: StoredModel, digest: str | None) -> None:
        if digest and entry.digest != digest:
            raise _damaged(entry, f"its digest is {entry.digest}, not {digest}", expected=digest)
        self.check_sizes(entry)
        files = entry.manifest.files
        with _hashers() as pool:
            paths = [entry.path / file.path for file in files]
            for file, sha256 in zip(files, pool.map(hash_file, paths), strict=True):
                if sha256 != file.sha256:
                    raise _damaged(
                        entry, f"{file.path} has changed since it was stored", file=file.path
                    )
        for path in _strays(entry):
            relative = path.relative_to(entry.path).as_posix()
            raise _damaged(entry, f"{relative} was added after it was stored", file=relative)

    def check_sizes(self, entry: StoredModel) -> None:
        """Check what can be checked without reading: every file is there and has its size.

        Raises:
            IntegrityError: one is missing or has another size.
        """
        with reading(entry.tag):
            for file in entry.manifest.files:
                path = entry.path / file.path
                if path.is_symlink() or not path.is_file():
                    raise _damaged(entry, f"{file.path} is missing", file=file.path)
                if path.stat().st_size != file.size:
                    raise _damaged(
                        entry, f"{file.path} has changed since it was stored", file=file.path
                    )

    @contextlib.contextmanager
    def writing(self, *, sweep: bool = True) -> Iterator[None]:
        """Hold the store's lock for writing.

        Args:
            sweep: first remove what killed writers left, when nobody else writes. A fetch that was
                killed goes on with the blobs that it had, so it sweeps afterwards.
        """
        with self._lock("lock") as lock:
            if sweep:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._sweep()
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield

    def collect_garbage(self, *, dry_run: bool = False) -> Garbage:
        """Free what no entry uses. Services that run keep the files that they have open.

        Waits some seconds for other commands to end: one that looks only is quick.

        Args:
            dry_run: only look what there is, at once or not at all.

        Raises:
            PackagingError: another process writes to the store, or the store refused.
        """
        if not self.private.is_dir():
            return Garbage()
        try:
            with self._lock("lock") as lock:
                _lock_alone(lock, 0 if dry_run else WAIT_FOR_WRITERS_S)
                garbage = self._garbage()
                if not dry_run:
                    self._sweep()
                return garbage
        except BlockingIOError as exc:
            raise PackagingError(
                f"another command writes to the store at {self.models}; try again when it has "
                "ended",
                "collect_garbage",
                {"store": str(self.models)},
            ) from exc
        except OSError as exc:
            raise store_failure(exc, self.models) from exc

    def _garbage(self) -> Garbage:
        """What no entry links to; who calls holds the lock alone."""
        folders = (self.blobs.folder, self.private / "staging")
        found = [path.lstat() for folder in folders for path in folder.rglob("*")]
        links = Counter(status.st_ino for status in found)
        unused = {
            status.st_ino: status.st_size
            for status in found
            if stat.S_ISREG(status.st_mode) and status.st_nlink <= links[status.st_ino]
        }
        return Garbage(len(unused), sum(unused.values()))

    @contextlib.contextmanager
    def fetching(self) -> Iterator[None]:
        """Be the only one who fetches into this store; others wait."""
        with self._lock("fetch.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _lock(self, name: str) -> TextIO:
        """A file to lock; closing it, or the end of the process, lets go of it."""
        try:
            self.private.mkdir(parents=True, exist_ok=True)
            return (self.private / name).open("w")
        except OSError as exc:
            raise store_failure(exc, self.models) from exc

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A folder on the store's file system that is gone afterwards unless it was moved."""
        folder = self.private / "staging" / uuid.uuid4().hex
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def readers_of_copies(self, sources: Iterable[Path]) -> int:
        """Who may read what is made of these files in the store (`readers.py`)."""
        with self.staging() as folder:
            (folder / "new").mkdir()
            return readers_of_copies(sources, (folder / "new").stat())

    def _sweep(self) -> None:
        shutil.rmtree(self.private / "staging", ignore_errors=True)
        self.blobs.sweep()

    def _store_files(
        self, files: Sequence[tuple[str, Path]], readers: int, progress: Progress | None
    ) -> tuple[StoredFile, ...]:
        """Make blobs of files, several at a time."""
        for relative, _ in files:
            if not is_portable(relative):
                raise PackagingError(
                    f"{relative!a} is not a file name that every system has; rename the file",
                    _OPERATION,
                    {"file": ascii(relative)},
                )
        with _hashers() as pool:
            adding = [
                pool.submit(self.blobs.add, path, relative, readers, progress)
                for relative, path in files
            ]
            try:
                return tuple(sorted(one.result() for one in adding))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _create(
        self,
        tag: str,
        manifest: Manifest,
        labels: Mapping[str, str] | None,
        metadata: Mapping[str, Any] | None,
        *,
        readers: int,
        check: Callable[[Path], None] | None = None,
    ) -> StoredModel:
        """Put the entry together where nobody sees it, and let it appear."""
        name, _, version = tag.partition(":")
        place = self._place(tag)
        with self.staging() as folder:
            entry = folder / "entry"
            entry.mkdir()
            for file in manifest.files:
                self.blobs.link(file, readers, entry / file.path)
            (entry / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
            write_model_yaml(entry / "model.yaml", tag, manifest, labels, metadata)
            restrict(entry, readers)
            if check:
                check(entry)
            while not publish(entry, self.models, name, version):
                if kept := self._keep(tag, manifest, labels, metadata, readers):
                    return kept  # another process was quicker
                # What has the place cannot be read, so it could not be served.
                place.rename(folder / uuid.uuid4().hex)
        return StoredModel(tag, place, manifest, labels or {}, metadata or {}, created=True)

    def _keep(
        self,
        tag: str,
        manifest: Manifest,
        labels: Mapping[str, str] | None,
        metadata: Mapping[str, Any] | None,
        readers: int,
    ) -> StoredModel | None:
        """The entry that has this tag already; None when there is none that can be read.

        Raises:
            PackagingError: it has other content, or was not made by this toolkit.
        """
        place = self._place(tag)
        if not place.is_dir():
            return None
        if not os.access(place, os.R_OK | os.X_OK):
            raise PackagingError(
                f"{tag} is taken by an entry that this user may not read; give this one another "
                "version",
                _OPERATION,
                {"tag": tag, "path": str(place)},
            )
        try:
            entry = self._read(tag)
        except IntegrityError as exc:
            if (place / FILE_NAME).is_file() or not (place / "model.yaml").is_file():
                return None
            raise PackagingError(
                f"{tag} is taken by an entry that this toolkit did not make; give this one another "
                "version",
                _OPERATION,
                {"tag": tag, "path": str(place)},
            ) from exc
        if entry.digest != manifest.digest:
            raise PackagingError(
                f"{tag} is taken by other content; give this one another version",
                _OPERATION,
                {"tag": tag, "stored": entry.digest, "given": manifest.digest},
            )
        self._mend(entry, readers)
        if (labels or {}) != entry.labels or (metadata or {}) != entry.metadata:
            logger.warning("%s keeps the labels and metadata that it was stored with", tag)
        if readers != (stays := readers_of(place.stat())):
            who = {EVERYONE: "everyone", GROUP: "its group", OWNER: "its owner alone"}
            logger.warning("%s stays readable to %s, as it was stored", tag, who[stays])
        return entry

    def _mend(self, entry: StoredModel, checked: int) -> None:
        """Bring an entry back to what its manifest says; its readers stay.

        Args:
            checked: for these readers, blobs of all its content were just checked.
        """
        readers = readers_of(entry.path.stat())
        for path in _strays(entry):
            path.unlink()
        for file in entry.manifest.files:
            path, blob = entry.path / file.path, self.blobs.path(file, checked)
            if path.is_file() and (path.samefile(blob) or hash_file(path) == file.sha256):
                continue
            self.blobs.add(blob, file.path, readers)
            with self.staging() as folder:
                self.blobs.link(file, readers, folder / "file")
                path.parent.mkdir(parents=True, exist_ok=True)
                (folder / "file").replace(path)

    def _read(self, tag: str) -> StoredModel:
        path = self._place(tag)
        manifest = read_manifest(path)
        try:
            info = read_yaml(path / "model.yaml")
            labels, metadata = plain(info["labels"], info["metadata"])
        except Exception as exc:  # PyYAML has no end of them
            raise IntegrityError(
                f"{tag}: its model.yaml cannot be read; package it again",
                "get_model",
                {"tag": tag, "path": str(path)},
            ) from exc
        user_metadata = {k: v for k, v in metadata.items() if k != "mlops"}
        return StoredModel(tag, path, manifest, labels, user_metadata)

    def _latest(self, name: str) -> str | None:
        return newest_version(self.models / name, "model.yaml")


def newest_version(folder: Path, file_name: str) -> str | None:
    """The version of a model or Bento that was made last; None when there is none.

    `latest` points to it; where that is missing or stale, the files' times say it.

    Args:
        folder: of all versions.
        file_name: what every version has.
    """
    with contextlib.suppress(OSError, ValueError):
        version = (folder / "latest").read_text(encoding="utf-8").strip()
        if tags.is_tag(f"{folder.name}:{version}") and (folder / version / file_name).is_file():
            return version
    made = {}
    for version in _names_in(folder):
        with contextlib.suppress(OSError):
            made[version] = (folder / version / file_name).stat().st_mtime_ns
    return max(made, key=made.__getitem__) if made else None


def _lock_alone(lock: TextIO, timeout_s: float) -> None:
    """Be the only one who holds the lock; raises `BlockingIOError` when others go on."""
    give_up_s = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= give_up_s:
                raise
            time.sleep(0.1)
        else:
            return


@contextlib.contextmanager
def reading(tag: str) -> Iterator[None]:
    """What vanishes or cannot be read while `tag` is looked at, in one sentence.

    Raises:
        IntegrityError: in place of the operating system's error.
    """
    try:
        yield
    except OSError as exc:
        what = (
            "was deleted, or something of it, while it was read"
            if exc.errno in {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}
            else f"cannot be read: {exc.filename}: {exc.strerror}"
        )
        raise IntegrityError(
            f"{tag} {what}; package or fetch it again",
            "read_entry",
            {"tag": tag, "path": str(exc.filename or "")},
        ) from exc


def _names_in(folder: Path) -> list[str]:
    """What lies in a folder, ordered; nothing where it is gone or this user may not look."""
    with contextlib.suppress(OSError):
        return sorted(path.name for path in folder.iterdir())
    return []


def _folders() -> tuple[Path, Path]:
    """BentoML's folders for models and for Bentos.

    A process that uses BentoML asks it: a Bento in a container brings a store of its own. To import
    it takes a second and 60 MB, so one that does not use it looks where BentoML would.

    Raises:
        OSError, RuntimeError: they cannot be made or found.
    """
    if "bentoml" not in sys.modules:
        named = os.path.expandvars(os.environ.get("BENTOML_HOME", "~/bentoml"))
        home = Path(named).expanduser()
        folders = home / "models", home / "bentos"
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        return folders
    from bentoml._internal.configuration.containers import BentoMLContainer
    from bentoml.exceptions import BentoMLException

    try:
        stores = BentoMLContainer.model_store.get(), BentoMLContainer.bento_store.get()
    except BentoMLException as exc:
        raise OSError(str(exc)) from exc
    return Path(stores[0]._path), Path(stores[1]._path)


def _damaged(entry: StoredModel, message: str, **details: Any) -> IntegrityError:
    return IntegrityError(
        f"{entry.tag}: {message}; nothing of it is served, package it again",
        "verify",
        {"tag": entry.tag, "path": str(entry.path), **details},
    )


def _hashers() -> ThreadPoolExecutor:
    """Threads to hash files side by side: one keeps one core busy."""
    return ThreadPoolExecutor(min(4, os.cpu_count() or 1))


def _strays(entry: StoredModel) -> list[Path]:
    """What is in an entry's folder and not in its manifest; Finder's own file does no harm."""
    known = {file.path for file in entry.manifest.files} | RESERVED_NAMES
    return [
        path
        for path in sorted(entry.path.rglob("*"))
        if (path.is_symlink() or not path.is_dir())
        and path.relative_to(entry.path).as_posix() not in known
        and path.name != ".DS_Store"
    ]


def publish(staged: Path, store: Path, name: str, version: str) -> bool:
    """Make a staged folder appear as `store/name/version`; False when that place is taken."""
    place = store / name / version
    while True:
        place.parent.mkdir(exist_ok=True)
        try:
            staged.rename(place)
            break
        except OSError as exc:
            if exc.errno in {errno.ENOTEMPTY, errno.EEXIST}:
                return False
            # With its last version BentoML deletes the name's folder.
            if exc.errno != errno.ENOENT or not staged.exists():
                raise
    point_latest(staged.parent, store, name, version)
    return True


def point_latest(staging: Path, store: Path, name: str, version: str) -> None:
    """Let BentoML's `name:latest` mean this version; `staging` is a folder on its file system."""
    (staging / "latest").write_text(version, encoding="utf-8")
    (staging / "latest").replace(store / name / "latest")
