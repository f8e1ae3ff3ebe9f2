"""All that a tag stands for, as one document with one digest: a Bento's files and its models.

A deployment pins this digest, and it is what is published for other machines (`shared.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from mlops.errors import IntegrityError, PackagingError
from mlops.registry import tags
from mlops.registry.blobs import hash_file
from mlops.registry.manifest import (
    FILE_NAME,
    Manifest,
    StoredFile,
    digest_of,
    is_portable,
    parse_files,
    parse_manifest,
)
from mlops.registry.model_yaml import plain, read_yaml
from mlops.registry.store import RESERVED_NAMES, ModelStore, newest_version, reading

FORMAT = 1

_OPERATION = "read_index"


@dataclass(frozen=True)
class IndexedModel:
    """One model of an index.

    Attributes:
        manifest: None for a model that this toolkit did not make.
        files: then, all in its folder; otherwise none, for the manifest has them.
    """

    tag: str
    manifest: Manifest | None
    files: tuple[StoredFile, ...]
    labels: Mapping[str, str]
    metadata: Mapping[str, Any]

    @property
    def contents(self) -> tuple[StoredFile, ...]:
        """Its files, but not what the store writes beside them."""
        return self.manifest.files if self.manifest else self.files


@dataclass(frozen=True)
class Index:
    """What a tag stands for.

    Attributes:
        kind: "bento" or "model".
        files: the Bento's own.
        models: all that the Bento names, or the one; and the bases of adapters. Ordered by tag.
        digest: `sha256:` and 64 hexadecimal digits, for all of it.
    """

    tag: str
    kind: str
    files: tuple[StoredFile, ...]
    models: tuple[IndexedModel, ...]
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", digest_of(self._content()))

    @property
    def size(self) -> int:
        """Bytes of all files; the same content counts once."""
        files = [*self.files, *(file for model in self.models for file in model.contents)]
        return sum({file.blob_name: file.size for file in files}.values())

    def to_json(self) -> str:
        """The index as `parse_index` takes it."""
        return json.dumps(self._content(), indent=1, sort_keys=True)

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "tag": self.tag,
            "kind": self.kind,
            "files": [asdict(file) for file in self.files],
            "models": [asdict(model) for model in self.models],
        }


def parse_index(text: bytes) -> Index:
    """The index in a document that anybody may have written.

    Raises:
        ValueError, TypeError, KeyError, RecursionError: it holds none.
    """
    data = json.loads(text)
    if data["format"] != FORMAT:
        raise ValueError(f"its format is {data['format']!r}, and this version reads {FORMAT}")
    if type(data["models"]) is not list:
        raise TypeError("its models are no list")
    models = tuple(_parse_model(item) for item in data["models"])
    index = Index(data["tag"], data["kind"], parse_files(data["files"]), models)
    named = {model.tag for model in models}
    if not is_full_tag(index.tag) or len(named) != len(models):
        raise ValueError("it has no tag, or one twice")
    if index.kind == "bento":
        _require(index.files, "bento.yaml")
    elif index.kind != "model" or index.files or index.tag not in named:
        raise ValueError("it is neither that of a Bento nor that of a model")
    return index


def _parse_model(data: dict[str, Any]) -> IndexedModel:
    manifest = None if data["manifest"] is None else parse_manifest(data["manifest"])
    labels, metadata = plain(data["labels"], data["metadata"])
    model = IndexedModel(data["tag"], manifest, parse_files(data["files"]), labels, metadata)
    if not is_full_tag(model.tag):
        raise ValueError(f"{model.tag!r} is no tag")
    if manifest is None:
        _require(model.files, "model.yaml")
    elif model.files or any(file.path.lower() in RESERVED_NAMES for file in manifest.files):
        raise ValueError(f"{model.tag} has files that no model has")
    return model


def _require(files: tuple[StoredFile, ...], name: str) -> None:
    if name not in {file.path for file in files}:
        raise ValueError(f"{name} is missing")


def local_index(tag: str) -> Index:
    """What the local store has under `tag`: the Bento, or the model when there is no such Bento.

    A Bento's files are hashed, and so are models that this toolkit did not make. Of other models
    the sizes are checked: who loads one verifies it.

    Raises:
        PackagingError: there is no such Bento or model, or it has files that cannot be published.
        IntegrityError: something of it is missing or damaged.
    """
    check_tag(tag)
    with reading(tag):
        return _local_index(tag)


def _local_index(tag: str) -> Index:
    store = ModelStore()
    bento = folder_of(store.bentos, tag)
    is_bento = bento.is_dir()
    named = _models_of(bento, tag) if is_bento else {tag}
    models = {name: _describe(store, name) for name in sorted(named)}
    manifests = [model.manifest for model in models.values() if model.manifest]
    known = {manifest.digest for manifest in manifests}
    for manifest in manifests:
        if manifest.base_digest and manifest.base_digest not in known:
            base = _find_base(store, tag, manifest.base_digest, manifest.base_tag)
            models[base] = _describe(store, base)
            known.add(manifest.base_digest)
    return Index(
        tag,
        "bento" if is_bento else "model",
        files_in(bento) if is_bento else (),
        tuple(models[name] for name in sorted(models)),
    )


def newest(tag: str) -> str:
    """`name` and `name:latest` as the tag of the newest Bento, or else of the newest model.

    Raises:
        PackagingError: there is neither, or it is no tag.
    """
    name = tag.removesuffix(":latest")
    if ":" in name or not tags.is_tag(name):
        check_tag(tag)
        return tag
    store = ModelStore()
    for folder, file_name in ((store.bentos, "bento.yaml"), (store.models, "model.yaml")):
        if version := newest_version(folder / name, file_name):
            return f"{name}:{version}"
    raise PackagingError(
        f"there is no Bento and no model {tag!r} in the store; `bentoml list` and `mlops models "
        "list` show what there is",
        "find_newest",
        {"tag": tag},
    )


def folder_of(parent: Path, tag: str) -> Path:
    """Where BentoML keeps what has this tag."""
    return parent / tag.replace(":", "/")


def check_tag(tag: str) -> None:
    """Raise `PackagingError` unless the tag names one version."""
    if not is_full_tag(tag):
        raise PackagingError(
            f"{tag!r} does not name one version: give NAME:VERSION", "check_tag", {"tag": tag}
        )


def is_full_tag(tag: object) -> TypeGuard[str]:
    """True for `name:version`, and not for `name:latest`, which can become another."""
    if not isinstance(tag, str) or not tags.is_tag(tag):
        return False
    return tag.partition(":")[2] not in {"", "latest"}


def files_in(folder: Path) -> tuple[StoredFile, ...]:
    """All files under a folder, hashed, ordered by path; without what Python and Finder leave.

    Raises:
        PackagingError: something in it is no file, or its name is not one on every system.
    """
    files = []
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        name = relative.as_posix()
        if "__pycache__" in relative.parts or path.name == ".DS_Store":
            continue
        if path.is_symlink() or not (path.is_file() or path.is_dir()) or not is_portable(name):
            raise PackagingError(
                f"{name!a} in {folder} is a link, no regular file, or has a name that not every "
                "system has; remove it",
                _OPERATION,
                {"path": str(folder), "file": ascii(name)},
            )
        if path.is_file():
            files.append(StoredFile(name, path.stat().st_size, hash_file(path)))
    return tuple(sorted(files))


def _models_of(bento: Path, tag: str) -> set[str]:
    """Tags of the stored models that a Bento names; those of a model hub are not in the store."""
    try:
        info = read_yaml(bento / "bento.yaml")
        parts = [info, *info.get("services", [])]
        models = [model for part in parts for model in part.get("models", [])]
        named = {one["tag"] for one in models if one.get("registry", "bentoml") == "bentoml"}
        for name in named:
            check_tag(name)
    except Exception as exc:  # PyYAML has no end of them
        raise IntegrityError(
            f"the bento.yaml of {tag} cannot be read; delete the Bento and package it again",
            _OPERATION,
            {"tag": tag, "path": str(bento)},
        ) from exc
    return named


def _describe(store: ModelStore, tag: str) -> IndexedModel:
    folder = folder_of(store.models, tag)
    if store.has(tag) and not (folder / FILE_NAME).exists():
        return IndexedModel(tag, None, files_in(folder), {}, {})
    entry = store.get(tag)
    store.check_sizes(entry)
    # JSON has no dates: they become text.
    metadata = json.loads(json.dumps(entry.metadata, default=str))
    return IndexedModel(tag, entry.manifest, (), entry.labels, metadata)


def _find_base(store: ModelStore, tag: str, digest: str, base_tag: str | None) -> str:
    """Tag of an adapter's base: the one that it was packaged with, or another of that content."""
    if is_full_tag(base_tag) and store.has(base_tag) and store.get(base_tag).digest == digest:
        return base_tag
    base = store.find(digest)
    if base is None:
        raise IntegrityError(
            f"the base model of {tag} is not in the store any more: package it again",
            _OPERATION,
            {"tag": tag, "expected": digest},
        )
    return base.tag
