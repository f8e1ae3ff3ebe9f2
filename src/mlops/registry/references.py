"""From what a user names as a model to the files to load: a folder, a model tag or a hub id."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mlops.checkpoints import Checkpoint, CheckpointKind, hub, recognise
from mlops.errors import IntegrityError, PackagingError
from mlops.registry import tags
from mlops.registry.manifest import is_digest
from mlops.registry.store import ModelStore


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
    path = Path(text).expanduser()
    if path.exists():
        return ResolvedModel(path.resolve(), recognise(path))
    tag, _, digest = text.partition("@")
    if isinstance(model, str) and tags.is_tag(tag) and (not digest or is_digest(digest)):
        entry = ModelStore().get(tag)
        resolved = ResolvedModel(entry.path, recognise(entry.path), entry.tag, entry.digest)
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


def is_hub_id(text: str) -> bool:
    """True for `org/name`, unless the first part is a folder here: then it is a mistyped path."""
    name = text.partition("@")[0]
    return hub.looks_like_hub_id(name) and not Path(name).parent.exists()


def _with_base(adapter: ResolvedModel, base_model: str | Path | None) -> ResolvedModel:
    manifest = ModelStore().get(adapter.tag).manifest if adapter.tag is not None else None
    if base_model is None and manifest is not None and manifest.base_tag:
        base = _find(manifest.base_tag)
        verify_digest(base, manifest.base_digest or "")
        return replace(adapter, base=base)
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
    trained_on = manifest.base_digest if manifest is not None else None
    if trained_on and base.digest and base.digest != trained_on:
        raise PackagingError(
            f"the adapter {adapter.tag} was packaged for another base model than {named}",
            "resolve",
            {"adapter": adapter.tag, "expected": trained_on, "found": base.digest},
        )
    return replace(adapter, base=base)
