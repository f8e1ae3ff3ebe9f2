"""The model store: BentoML's own, written atomically and with every byte accounted for.

An entry is `models/<name>/<version>/` as BentoML lays it out, so `bentoml models list` and
`bentoml.models.get` work on it. How one comes to be:

1. the files become blobs (`blobs.py`), written and hashed once;
2. the entry is put together in a staging folder: links to the blobs, manifest, `model.yaml`;
3. one `rename` to its final place makes it appear. That call fails if the place is taken, so of
   many writers of one tag exactly one wins;
4. the `latest` pointer is replaced.

A writer holds the store's lock shared. One that gets it alone first sweeps what a killed writer
left behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
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

logger = logging.getLogger(__name__)

RESERVED_NAMES = frozenset({"model.yaml", FILE_NAME})
"""Names at the root of an entry that are not the model's own."""

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
        with self.writing():
            try:
                manifest = Manifest(
                    self._store_files(files, progress),
                    kind,
                    framework,
                    base_digest=base.digest if base else None,
                    base_tag=base.tag if base else None,
                )
                if reuse and (same := self.find(manifest.digest)):
                    self._mend(same)
                    return same
                tag = f"{name}:{version or default_version(manifest.digest)}"
                kept = self._keep(tag, manifest, labels, metadata)
                return kept or self._create(tag, manifest, labels, metadata, check)
            except OSError as exc:
                raise store_failure(exc, self.models) from exc

    def install(
        self,
        tag: str,
        manifest: Manifest,
        labels: Mapping[str, str],
        metadata: Mapping[str, Any],
    ) -> StoredModel:
        """Make the entry whose blobs are in the store already, or mend it.

        Raises:
            PackagingError: other content has this tag, or the store refused; nothing is left over.
        """
        with self.writing(sweep=False):
            try:
                kept = self._keep(tag, manifest, labels, metadata)
                return kept or self._create(tag, manifest, labels, metadata, None)
            except OSError as exc:
                raise store_failure(exc, self.models) from exc

    def has(self, tag: str) -> bool:
        """True when an entry has this tag."""
        return (self.models / tag.replace(":", "/") / "model.yaml").is_file()

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
        if not valid or not version or not self.has(f"{name}:{version}"):
            raise PackagingError(
                f"no model {tag!r} in the store at {self.models}; `mlops models list` shows what "
                "there is",
                "get_model",
                {"tag": tag, "store": str(self.models)},
            )
        return self._read(f"{name}:{version}")

    def list(self) -> list[StoredModel]:
        """Every entry that this toolkit made, ordered by tag. Others in the store are left out.

        One that cannot be read is left out too, with a warning in the log.
        """
        entries = []
        for manifest in sorted(self.models.glob(f"*/*/{FILE_NAME}")):
            try:
                entries.append(self._read(f"{manifest.parent.parent.name}:{manifest.parent.name}"))
            except IntegrityError as exc:
                logger.warning("%s", exc)
        return entries

    def find(self, digest: str) -> StoredModel | None:
        """Some entry with this content, or None."""
        for manifest in sorted(self.models.glob(f"*/*/{FILE_NAME}")):
            with contextlib.suppress(IntegrityError):  # what cannot be read is not this content
                if read_manifest(manifest.parent).digest == digest:
                    return self._read(f"{manifest.parent.parent.name}:{manifest.parent.name}")
        return None

    def verify(self, entry: StoredModel, digest: str | None = None) -> None:
        """Check every byte of an entry against its manifest, and that against `digest`.

        Raises:
            IntegrityError: a file is missing, added or changed, or the digest is another.
        """
        entry = replace(entry, manifest=read_manifest(entry.path))
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
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._sweep()
                except BlockingIOError:
                    pass
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield

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
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _sweep(self) -> None:
        shutil.rmtree(self.private / "staging", ignore_errors=True)
        self.blobs.sweep()

    def _store_files(
        self, files: Iterable[tuple[str, Path]], progress: Progress | None
    ) -> tuple[StoredFile, ...]:
        """Make blobs of files, several at a time."""
        files = list(files)
        for relative, _ in files:
            if not is_portable(relative):
                raise PackagingError(
                    f"{relative!a} is not a file name that every system has; rename the file",
                    _OPERATION,
                    {"file": ascii(relative)},
                )
        with _hashers() as pool:
            adding = [
                pool.submit(self.blobs.add, path, relative, progress) for relative, path in files
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
        check: Callable[[Path], None] | None,
    ) -> StoredModel:
        """Put the entry together where nobody sees it, and let it appear."""
        name, _, version = tag.partition(":")
        place = self.models / name / version
        with self.staging() as folder:
            entry = folder / "entry"
            entry.mkdir()
            for file in manifest.files:
                self.blobs.link(file, entry / file.path)
            (entry / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
            write_model_yaml(entry / "model.yaml", tag, manifest, labels, metadata)
            if check:
                check(entry)
            while not publish(entry, self.models, name, version):
                if kept := self._keep(tag, manifest, labels, metadata):
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
    ) -> StoredModel | None:
        """The entry that has this tag already; None when there is none that can be read.

        Raises:
            PackagingError: it has other content, or was not made by this toolkit.
        """
        place = self.models / tag.replace(":", "/")
        if not place.is_dir():
            return None
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
        self._mend(entry)
        if (labels or {}) != entry.labels or (metadata or {}) != entry.metadata:
            logger.warning("%s keeps the labels and metadata that it was stored with", tag)
        if self._latest(entry.name) is None:
            point_latest(self.models, entry.name, entry.version)
        return entry

    def _mend(self, entry: StoredModel) -> None:
        """Bring an entry whose blobs were just checked back to what its manifest says."""
        for path in _strays(entry):
            path.unlink()
        for file in entry.manifest.files:
            path, blob = entry.path / file.path, self.blobs.path(file)
            if path.is_file() and (path.samefile(blob) or hash_file(path) == file.sha256):
                continue
            with self.staging() as folder:
                self.blobs.link(file, folder / "file")
                path.parent.mkdir(parents=True, exist_ok=True)
                (folder / "file").replace(path)

    def _read(self, tag: str) -> StoredModel:
        path = self.models / tag.replace(":", "/")
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
    made = [path for path in folder.glob(f"*/{file_name}") if path.is_file()]
    return max(made, key=lambda path: path.stat().st_mtime_ns).parent.name if made else None


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
    place.parent.mkdir(exist_ok=True)
    try:
        staged.rename(place)
    except OSError as exc:
        if exc.errno in {errno.ENOTEMPTY, errno.EEXIST}:
            return False
        raise
    point_latest(store, name, version)
    return True


def point_latest(store: Path, name: str, version: str) -> None:
    """Let BentoML's `name:latest` mean this version."""
    partial = store / name / f"latest.{uuid.uuid4().hex}"
    try:
        partial.write_text(version, encoding="utf-8")
        partial.replace(store / name / "latest")
    finally:
        partial.unlink(missing_ok=True)
