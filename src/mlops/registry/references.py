"""From what a user names as a model to the files to load: a folder, a model tag or a hub id."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mlops.checkpoints import Checkpoint, CheckpointKind, hub, recognise, stored_files
from mlops.errors import IntegrityError, PackagingError
from mlops.hardware.home import expand
from mlops.registry import tags
from mlops.registry.blobs import hash_file
from mlops.registry.manifest import FILE_NAME, Manifest, StoredFile, is_digest
from mlops.registry.store import ModelStore, StoredModel


@dataclass(frozen=True)
class ResolvedModel:
    """A model whose files are on this machine.

    Attributes:
        path: the folder (or single file) with the model.
        tag, digest: of its entry in the model store; None for a plain folder.
        revision: commit of a model from the Hugging Face Hub.
        base: the base model of an adapter.
    """

    path: Path
    checkpoint: Checkpoint
    tag: str | None = None
    digest: str | None = None
    revision: str | None = None
    base: ResolvedModel | None = None

    @property
    def is_adapter(self) -> bool:
        """True for a LoRA or DoRA adapter, which needs its base to run."""
        return self.checkpoint.kind is CheckpointKind.ADAPTER


def resolve(
    model: str | Path, *, base_model: str | Path | None = None, digest: str | None = None
) -> ResolvedModel:
    """Find a model, and the base model when it is an adapter. No weights are loaded.

    Args:
        model: a folder or file, a model tag (`name`, `name:version`, either with `@sha256:…`) or a
            hub id (`org/name`, `org/name@revision`), tried in this order.
        base_model: the same for the base of an adapter; by default what the adapter names.
        digest: what the entry of a tag must have.

    Raises:
        PackagingError: nothing is there, or it is not a model that can be recognised.
        IntegrityError: the entry of a tag has another digest.
    """
    resolved = _find(model)
    if digest:
        verify_digest(resolved, digest)
    if not resolved.is_adapter:
        if base_model is not None:
            raise PackagingError(
                f"{model} is {resolved.checkpoint.description}, not an adapter: it takes no "
                "base_model",
                "resolve",
                {"model": str(model), "base_model": str(base_model)},
            )
        return resolved
    return _with_base(resolved, base_model)


def verify(resolved: ResolvedModel) -> None:
    """Check every stored byte of a model and of its base against their digests.

    A plain folder has no digest to check against; its headers were checked by `resolve`.

    Raises:
        IntegrityError: a byte, a file or a digest is not what was stored.
    """
    for part in (resolved.base, resolved):
        if part is not None and part.tag is not None:
            store = ModelStore()
            store.verify(store.get(part.tag), part.digest)


def verify_digest(resolved: ResolvedModel, digest: str) -> None:
    """Raise `IntegrityError` unless the entry has this digest."""
    if resolved.digest != digest:
        raise IntegrityError(
            f"{resolved.tag or resolved.path} has the digest {resolved.digest}, not {digest}; "
            "nothing of it is served",
            "resolve",
            {"tag": resolved.tag, "expected": digest, "found": resolved.digest},
        )


def _find(model: str | Path) -> ResolvedModel:
    text = str(model)
    path = expand(text)
    if path.exists():
        path = path.resolve()
        return _entry_at(path) or ResolvedModel(path, recognise(path))
    if isinstance(model, str) and (reference := split_reference(text)):
        tag, digest = reference
        resolved = _resolved(ModelStore().get(tag))
        if digest:
            verify_digest(resolved, digest)
        return resolved
    if isinstance(model, str) and is_hub_id(text):
        name, _, revision = text.partition("@")
        snapshot = hub.download(name, revision or None)
        return ResolvedModel(
            snapshot.path, recognise(snapshot.path), revision=f"{name}@{snapshot.revision}"
        )
    raise PackagingError(
        f"{text!r} does not exist: give a folder, a model tag or a Hugging Face id (org/name)",
        "resolve",
        {"path": text},
    )


def _entry_at(path: Path) -> ResolvedModel | None:
    """The entry of the model store whose folder this is, as trainers name the base they loaded."""
    if not (path / FILE_NAME).is_file():  # a plain folder needs no store
        return None
    store = ModelStore()
    tag = f"{path.parent.name}:{path.name}"
    if path.parent.parent != store.models.resolve() or not tags.is_tag(tag) or not store.has(tag):
        return None
    return _resolved(store.get(tag))


def _resolved(entry: StoredModel) -> ResolvedModel:
    return ResolvedModel(entry.path, recognise(entry.path), entry.tag, entry.digest)


def split_reference(text: str) -> tuple[str, str | None] | None:
    """Tag and digest of `name`, `name:version` or either with `@sha256:…`; None for other text."""
    tag, at, digest = text.partition("@")
    if not tags.is_tag(tag) or (at and not is_digest(digest)):
        return None
    return tag, digest or None


def is_hub_id(text: str) -> bool:
    """True for `org/name`, unless the first part is a folder here: then it is a mistyped path."""
    name = text.partition("@")[0]
    return hub.looks_like_hub_id(name) and not Path(name).parent.exists()


def _with_base(adapter: ResolvedModel, base_model: str | Path | None) -> ResolvedModel:
    """The adapter with its base; a stored adapter takes the base it was packaged for, no other."""
    trained_on = None
    if adapter.tag is not None:
        manifest = ModelStore().get(adapter.tag).manifest
        trained_on = manifest.base_digest
        if base_model is None and trained_on is not None:
            return replace(adapter, base=_find_stored_base(adapter, trained_on))
    base = _find_base(adapter, base_model)
    if trained_on is not None and (base.digest or content_digest(base)) != trained_on:
        raise PackagingError(
            f"the adapter {adapter.tag} was packaged for another base model than {base_model}",
            "resolve",
            {"adapter": adapter.tag, "expected": trained_on, "base_model": str(base_model)},
        )
    return replace(adapter, base=base)


def _find_stored_base(adapter: ResolvedModel, digest: str) -> ResolvedModel:
    entry = ModelStore().find(digest)
    if entry is None:
        raise IntegrityError(
            f"the base model of {adapter.tag} is not in the store any more: package it again",
            "resolve",
            {"adapter": adapter.tag, "expected": digest},
        )
    return ResolvedModel(entry.path, recognise(entry.path), entry.tag, entry.digest)


def content_digest(model: ResolvedModel) -> str:
    """The digest that a plain folder would have in the store; reads every byte of it."""
    files = tuple(
        sorted(
            StoredFile(file.relative_path, file.size, hash_file(file.path))
            for file in stored_files(model.checkpoint)
        )
    )
    checkpoint = model.checkpoint
    return Manifest(files, checkpoint.kind.value, checkpoint.framework).digest


def _find_base(adapter: ResolvedModel, base_model: str | Path | None) -> ResolvedModel:
    info = adapter.checkpoint.adapter
    named = base_model or (info.base_model if info else None)
    if not named:
        raise PackagingError(
            f"the adapter {adapter.path} does not say which base model it belongs to: "
            "pass base_model=",
            "resolve",
            {"path": str(adapter.path)},
        )
    beside = adapter.path / named
    try:
        base = _find(beside if base_model is None and beside.exists() else named)
    except PackagingError as exc:
        raise PackagingError(
            f"the base model {str(named)!r} of the adapter {adapter.path} cannot be had: "
            f"{exc.message}; pass base_model= with where it is",
            exc.operation,
            {**exc.details, "adapter": str(adapter.path), "base_model": str(named)},
        ) from exc
    if base.is_adapter:
        raise PackagingError(
            f"the base model {str(named)!r} of the adapter {adapter.path} is itself an adapter",
            "resolve",
            {"path": str(adapter.path), "base_model": str(named)},
        )
    return base
