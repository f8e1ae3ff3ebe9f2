"""What clients have loaded and unloaded, kept in a file for the worker that comes after this one.

    load_lora_adapter, unload_lora_adapter -> `KeptAdapters` -> file
    a new worker: file -> `KeptAdapters` -> `without_changed` (what is configured), `load_again`

The file belongs to one run of the server and to one worker: adapters at run time need that.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from mlops.errors import IntegrityError, InvalidRequestError, ServiceError, sentence_of
from mlops.serving.http.adapters import find_adapter, without_folders
from mlops.serving.runner.base import AdapterRunner, Runner

logger = logging.getLogger(__name__)

Place = TypeVar("Place")


@dataclass(frozen=True)
class KeptAdapter:
    """An adapter as it was loaded.

    Attributes:
        path: a folder, or a tag with its digest.
        digest: of the folder's content; None for a tag, which has its own.
    """

    path: str
    digest: str | None


class KeptAdapters:
    """The adapters that have changed since the server began, by name.

    Args:
        file: where they are kept; it need not exist yet.
        folder: what clients may load from, besides the model store.

    Attributes:
        missing: why adapters that had been loaded are not there after a restart, by name.
    """

    def __init__(self, file: Path, folder: Path | None) -> None:
        self._file = file
        self._folder = folder
        self._changed: dict[str, KeptAdapter | None] = {}  # None: unloaded
        self.missing: dict[str, str] = {}

    def read(self) -> None:
        """Take over what an earlier worker has kept."""
        self.missing = {}
        if not self._file.exists():
            return
        try:
            kept = json.loads(self._file.read_text(encoding="utf-8"))
            self._changed = {name: one and KeptAdapter(**one) for name, one in kept.items()}
        except (OSError, ValueError, TypeError, AttributeError) as exc:
            logger.warning("adapters that were loaded at run time are lost: %s", exc)

    def without_changed(self, configured: Mapping[str, Place]) -> dict[str, Place]:
        """Those of the configured adapters that are still what was configured."""
        return {name: path for name, path in configured.items() if name not in self._changed}

    def load_again(self, runner: Runner) -> None:
        """Verify and load what was loaded before; what fails is told, and is not served."""
        for name, adapter in self._changed.items():
            if adapter is None:
                continue
            try:
                self._load(runner, name, adapter)
            except Exception as exc:  # whatever it is, the others are served
                reason = sentence_of(exc)
                self.missing[name] = without_folders(reason)
                logger.warning("the adapter %r cannot be loaded again: %s", name, reason)

    def adapter_at(self, path: str | Path) -> KeptAdapter:
        """What is at a path, or under a tag, now; reads all of an adapter's files.

        Raises:
            PackagingError: it cannot be recognised.
        """
        from mlops.checkpoints import recognise
        from mlops.registry.blobs import hash_file
        from mlops.registry.manifest import digest_of

        if isinstance(path, str):
            return KeptAdapter(path, None)
        checkpoint = recognise(path)
        if checkpoint.adapter is None:  # the runner refuses it
            return KeptAdapter(str(path), None)
        hashes = {name: hash_file(path / name) for name in checkpoint.files}
        return KeptAdapter(str(path), digest_of(hashes))

    def loaded(self, name: str, adapter: KeptAdapter) -> None:
        """Keep an adapter that a client has loaded, as it was before that."""
        self._keep(name, adapter)

    def unloaded(self, name: str) -> None:
        """Keep that a client has unloaded an adapter."""
        self._keep(name, None)

    def _load(self, runner: Runner, name: str, adapter: KeptAdapter) -> None:
        if not isinstance(runner, AdapterRunner):
            raise ServiceError("the model of this service takes no adapters", "load_adapter")
        path, details = adapter.path, {"adapter": name}
        try:
            found = find_adapter(path, self._folder)
        except InvalidRequestError as exc:
            reason = f"{path} is not there any more, or may not be loaded any more"
            raise IntegrityError(reason, "load_adapter", details) from exc
        if self.adapter_at(found) != adapter:
            reason = f"{path} has changed: load it again to serve what is there now"
            raise IntegrityError(reason, "load_adapter", details)
        runner.add_adapter(name, found)

    def _keep(self, name: str, adapter: KeptAdapter | None) -> None:
        self.missing.pop(name, None)
        self._changed[name] = adapter
        kept: dict[str, Any] = {
            one: changed and asdict(changed) for one, changed in self._changed.items()
        }
        partial = self._file.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(kept), encoding="utf-8")
            partial.replace(self._file)
        except OSError as exc:  # the change itself holds
            logger.warning("the adapter %r is forgotten when the worker restarts: %s", name, exc)
