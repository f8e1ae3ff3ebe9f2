"""A place that all nodes of a cluster reach: what is published there, each node fetches once.

    publish: local store -> blobs that are not there yet -> the index, last
    fetch:   index -> blobs that the local store lacks -> entries, each by one rename

At the location (`location.py`) lie

    index/<name>/<version>.json   what has this tag (`index.py`), with sizes and digests
    blobs/<size>-<sha256>         contents of files, each once

In a folder, each file may be read by those who may read it in the store that it comes from, and the
index by those who may read all of it. A node gives what it fetches to the readers of the index. An
object store has no such modes: who may read there is set for the bucket.

What comes from there is taken for hostile: sizes are bounded, names checked, and bytes hashed while
they are written. Whether a file may be executed is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from mlops.errors import IntegrityError, PackagingError
from mlops.registry.blobs import Progress, hash_file, store_failure
from mlops.registry.index import (
    Index,
    IndexedModel,
    check_tag,
    files_in,
    folder_of,
    local_index,
    newest,
    parse_index,
)
from mlops.registry.location import Location
from mlops.registry.manifest import StoredFile
from mlops.registry.readers import EVERYONE, restrict
from mlops.registry.store import ModelStore, reading
from mlops.registry.store import publish as put_in_place

MAX_INDEX_BYTES = 16 * 2**20

_NUM_THREADS = 4
_Item = TypeVar("_Item")


def local_digest(tag: str) -> str:
    """The digest that `publish` would return, from the local store alone; raises the same."""
    return local_index(tag).digest


def publish(tag: str, location: str, *, progress: Progress | None = None) -> str:
    """Copy a Bento with all its models, or a stored model with its base, to a shared place.

    Blobs that are there are not written again. A `publish` that is killed leaves blobs, which the
    next one goes on with, and pieces of blobs, which the next one removes (`Location.sweep`).

    Args:
        location: a path, or a URL that fsspec knows.
        progress: called with numbers of bytes; what is there already counts too.

    Returns:
        The digest of the index: of all that was published.

    Raises:
        PackagingError: there is no such Bento or model, other content is published under its tag,
            or the place refuses.
        IntegrityError: something is damaged, here or there.
        MissingDependencyError: the library for this kind of URL is not installed.
    """
    tag = newest(tag)
    index = local_index(tag)
    text = index.to_json().encode()
    if len(text) > MAX_INDEX_BYTES:
        raise PackagingError(
            f"{tag} has too many files to publish: its index would be larger than "
            f"{MAX_INDEX_BYTES} bytes",
            "publish",
            {"tag": tag},
        )
    shared = _SharedTag(tag, location)
    shared.place.sweep()
    published = shared.read_index()
    sources = list(_sources(index))
    if published is None or published.digest == index.digest:
        _side_by_side(lambda item: shared.upload(*item, progress), sources)
    if published is None:
        readers = shared.place.readers_of_copies(path for path, _ in sources)
        shared.place.create(shared.index_path, text, readers)
        published = shared.read_index()
    if published is None or published.digest != index.digest:
        raise PackagingError(
            f"{tag} is published at {shared.place.name} with other content; give this one another "
            "version",
            "publish",
            {**shared.details, "given": index.digest},
        )
    return index.digest


def fetch(tag: str, digest: str | None, location: str, *, progress: Progress | None = None) -> None:
    """See that the local store has what is published as `tag`.

    What the store has is not downloaded: the files of Bentos are hashed to know that, of models the
    sizes are looked at. One process of this machine downloads; others wait for it.

    Args:
        digest: of the index; None takes what is published now.
        location: a path, or a URL that fsspec knows.
        progress: called with numbers of bytes of what the store lacked.

    Raises:
        PackagingError: nothing is published as `tag`, the local store has other content under one
            of the tags, or one of the two refuses.
        IntegrityError: the index has another digest, or what is published is damaged. Nothing of
            it stays in the store.
        MissingDependencyError: the library for this kind of URL is not installed.
    """
    check_tag(tag)
    if digest and _has(tag, digest):
        return
    store = ModelStore()
    with store.fetching():
        if digest and _has(tag, digest):
            return
        shared = _SharedTag(tag, location)
        index = shared.read_index()
        if index is None:
            raise PackagingError(
                f"the shared store at {shared.place.name} has no {tag}; publish it with "
                f"`mlops push {tag} {shared.place.name}`",
                "fetch",
                shared.details,
            )
        if digest and index.digest != digest:
            raise shared.damaged(
                f"{shared.index_path} has the digest {index.digest}, not {digest}", digest=digest
            )
        try:
            _install(store, shared, index, progress)
        except IntegrityError:
            _sweep(store)
            raise
        _sweep(store)


class _SharedTag:
    """What one tag has at the shared place."""

    def __init__(self, tag: str, location: str) -> None:
        self.tag = tag
        self.place = Location(location)
        self.index_path = f"index/{tag.replace(':', '/')}.json"
        self.details = {"tag": tag, "location": self.place.name}

    def read_index(self) -> Index | None:
        """The index, checked; None when there is none."""
        size = self.place.size(self.index_path)
        if size is None:
            return None
        if size > MAX_INDEX_BYTES:
            raise self.damaged(f"{self.index_path} is larger than {MAX_INDEX_BYTES} bytes")
        text = b"".join(self.place.read(self.index_path, size))
        try:
            index = parse_index(text)
        except (ValueError, TypeError, KeyError, RecursionError) as exc:
            raise self.damaged(f"{self.index_path} is no valid index ({exc})") from exc
        if index.tag != self.tag:
            raise self.damaged(f"{self.index_path} is that of {index.tag}")
        return index

    def upload(self, source: Path, file: StoredFile, progress: Progress | None) -> None:
        """Write a blob unless it is there, with its size and for its readers."""
        path = f"blobs/{file.blob_name}"
        readers = self.place.readers_of_copies([source])
        if self.place.size(path) == file.size:
            if self.place.is_open_to(readers, path):
                if progress:
                    progress(file.size)
                return
            if readers != EVERYONE and not self.place.is_own(path):  # its readers would lose it
                raise PackagingError(
                    f"{self.tag}: another user has pushed {file.path} to {self.place.name} for "
                    "other readers: let both files be readable to the same group, or push to "
                    "another place",
                    "publish",
                    {**self.details, "file": file.path},
                )
        with reading(self.tag):
            if hash_file(source) != file.sha256:
                raise IntegrityError(
                    f"{self.tag}: {source} has changed since it was stored; package it again",
                    "publish",
                    {**self.details, "file": file.path},
                )
        try:
            self.place.upload(source, path, readers, progress)
        except PackagingError:
            with reading(self.tag):
                source.stat()  # was it the source that went away, and not the place?
            raise

    def download(
        self, store: ModelStore, file: StoredFile, readers: int, progress: Progress | None
    ) -> None:
        """Make sure that the local store has a blob for these readers."""
        if store.blobs.holds(file, readers):
            if progress:
                progress(file.size)
            return
        path = f"blobs/{file.blob_name}"
        size = self.place.size(path)
        if size is None:
            raise self.damaged(f"{path}, for {file.path}, is missing", file=file.path)
        if size != file.size or not store.blobs.try_receive(
            file, readers, self.place.read(path, size), progress
        ):
            raise self.damaged(f"{path}, for {file.path}, has other bytes", file=file.path)

    def readers(self, store: ModelStore) -> int:
        """Who may read what the local store makes of it: who may read the index, in a folder."""
        index = self.place.local_path(self.index_path)
        return store.readers_of_copies([index] if index else [])

    def damaged(self, message: str, **details: Any) -> IntegrityError:
        """What is at the shared place must not be used."""
        return IntegrityError(
            f"{self.tag} in the shared store at {self.place.name} is not what was published: "
            f"{message}; nothing of it is used",
            "fetch",
            {**self.details, **details},
        )

    def other_content(self, store: ModelStore, tag: str) -> PackagingError:
        """The local store has a tag already, and not what is published."""
        return PackagingError(
            f"the store at {store.models.parent} has another {tag} than {self.place.name}; delete "
            "it there or publish another version",
            "fetch",
            {**self.details, "taken": tag},
        )


def _sources(index: Index) -> Iterable[tuple[Path, StoredFile]]:
    """Every content of an index with a file that has it."""
    store = ModelStore()
    parts = [(folder_of(store.models, model.tag), model.contents) for model in index.models]
    parts.append((folder_of(store.bentos, index.tag), index.files))
    files = {
        file.blob_name: (folder / file.path, file) for folder, files in parts for file in files
    }
    return files.values()


def _install(
    store: ModelStore, shared: _SharedTag, index: Index, progress: Progress | None
) -> None:
    """Download what the store lacks, and when all is there let it appear: models first."""
    with store.writing(sweep=False):
        readers = shared.readers(store)
        models = [model for model in index.models if not _has_model(store, shared, model)]
        files = [file for model in models for file in model.contents]
        lacks_bento = index.kind == "bento" and not _has_files(
            store, shared, folder_of(store.bentos, index.tag), index.files
        )
        if lacks_bento:
            files += index.files
        _side_by_side(
            lambda file: shared.download(store, file, readers, progress),
            {file.blob_name: file for file in files}.values(),
        )
        for model in models:
            if model.manifest:
                store.install(model.tag, model.manifest, model.labels, model.metadata, readers)
            else:
                folder = folder_of(store.models, model.tag)
                _install_files(store, shared, folder, model.files, readers)
        if lacks_bento:
            folder = folder_of(store.bentos, index.tag)
            _install_files(store, shared, folder, index.files, readers)


def _install_files(
    store: ModelStore,
    shared: _SharedTag,
    folder: Path,
    files: Iterable[StoredFile],
    readers: int,
) -> None:
    """Let a Bento, or a model that is not this toolkit's, appear."""
    name, version = folder.parts[-2:]
    try:
        with store.staging() as staging:
            for file in files:
                store.blobs.link(file, readers, staging / "entry" / file.path)
            restrict(staging / "entry", readers)
            if not put_in_place(staging / "entry", folder.parent.parent, name, version):
                raise shared.other_content(store, f"{name}:{version}")
    except OSError as exc:
        raise store_failure(exc, folder) from exc


def _sweep(store: ModelStore) -> None:
    with store.writing():
        pass  # blobs that nothing links to are gone now


def _has(tag: str, digest: str) -> bool:
    """True when the local store has the tag with this digest, undamaged as far as sizes tell."""
    try:
        return local_digest(tag) == digest
    except (PackagingError, IntegrityError):
        return False


def _has_model(store: ModelStore, shared: _SharedTag, model: IndexedModel) -> bool:
    """False for a damaged one too: to install it mends it."""
    if not store.has(model.tag):
        return False
    if model.manifest is None:
        return _has_files(store, shared, folder_of(store.models, model.tag), model.files)
    try:
        entry = store.get(model.tag)
    except IntegrityError:
        return False
    if entry.digest != model.manifest.digest:
        raise shared.other_content(store, model.tag)
    try:
        store.check_sizes(entry)
    except IntegrityError:
        return False
    return True


def _has_files(
    store: ModelStore, shared: _SharedTag, folder: Path, files: tuple[StoredFile, ...]
) -> bool:
    if not folder.is_dir():
        return False
    if files_in(folder) != tuple(sorted(files)):
        raise shared.other_content(store, f"{folder.parent.name}:{folder.name}")
    return True


def _side_by_side(work: Callable[[_Item], None], items: Iterable[_Item]) -> None:
    """Several at a time; after the first failure, what has not begun does not begin."""
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        running = [pool.submit(work, item) for item in items]
        try:
            for one in running:
                one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
