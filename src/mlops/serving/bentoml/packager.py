"""From a checkpoint on disk to an entry of the model store and a Bento that serves it.

    recognise the checkpoint -> collect its files -> check that they can be loaded -> store them (an
    adapter's base first) -> build the Bento (`bento.py`) -> link both to an MLflow run, when one is
    given

No weights are loaded: headers say all that is needed, and the store reads each byte once.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mlops.checkpoints import (
    Checkpoint,
    CheckpointFile,
    CheckpointKind,
    adapter_delta_is_zero,
    check_adapter_fits,
    check_copies,
    check_finite,
    left_out,
    recognise,
    stored_files,
)
from mlops.engine.request import BASE_NAME
from mlops.engine.servable import check_loads
from mlops.errors import BentoMLError, ConfigError, PackagingError
from mlops.hardware.home import expand
from mlops.registry import ModelStore, ResolvedModel, StoredModel, references, tags
from mlops.registry.blobs import Progress
from mlops.registry.store import RESERVED_NAMES
from mlops.serving.bentoml import bento
from mlops.serving.bentoml.config import BentoMLConfig, ModelFramework

if TYPE_CHECKING:
    from mlops.client import TrackingClient

logger = logging.getLogger(__name__)
result_logger = logging.getLogger(f"{__name__}.result")
"""Of what the result says as well."""

SERVED_KINDS = frozenset({CheckpointKind.LANGUAGE_MODEL, CheckpointKind.ADAPTER})
"""Kinds of checkpoint that this version has a runner for."""

_KEPT_BY_A_COPY = ("kind", "has_tokenizer", "weight_files")

RUN_LABEL = "mlflow_run_id"
"""The label, or key of the metadata, that names the MLflow run which a model comes from."""


@dataclass
class PackageConfig:
    """What to package, and as what. Every field can be assigned later.

    Attributes:
        model_path: a folder or file; a Hugging Face id (`org/name@revision`) is downloaded.
        model_name: the tag's name; by default that of the folder.
        model_version: the tag's version, `major.minor.patch`; by default made from the digest.
        model_framework: what the files must turn out to be; by default whatever they are.
        service_name: name of the Bento and its service; by default the model's name.
        project_name: the team's project; becomes the label `project`.
        description: for people; becomes the Bento's readme.
        labels: text to text, for searches.
        metadata: plain values, kept with the model.
        include_patterns, exclude_patterns: globs as in `.gitignore`; by default the files that the
            checkpoint consists of are stored. `include_patterns` that match some of these say what
            is stored in their place; others ask for more of what is left out.
        base_model: folder, tag or hub id of an adapter's base; by default what the adapter names.
        adapters: further adapters of a full model (folder or tag each), by the name that a request
            gives; the Bento serves them all over the one base.
        service: settings that the Bento's service starts with.
    """

    model_path: str | Path | None = None
    model_name: str | None = None
    model_version: str | None = None
    model_framework: ModelFramework | str | None = None
    service_name: str | None = None
    project_name: str = "default"
    description: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    include_patterns: list[str] = field(default_factory=list)
    exclude_patterns: list[str] = field(default_factory=list)
    base_model: str | Path | None = None
    adapters: dict[str, str | Path] = field(default_factory=dict)
    service: BentoMLConfig | None = None

    def __new__(cls, *_: object, **given: object) -> Self:
        for name in given:
            cls._check_field(name)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.validate()

    def __setattr__(self, name: str, value: object) -> None:
        self._check_field(name)
        object.__setattr__(self, name, value)

    @classmethod
    def _check_field(cls, name: str) -> None:
        known = [item.name for item in fields(cls)]
        if name not in known:
            raise ConfigError(f"PackageConfig has no field {name!r}; it has {', '.join(known)}")

    def validate(self) -> None:
        """Check every field that has a value.

        Raises:
            PackagingError: a name or version that no tag can have.
            ConfigError: another field has a value that is not allowed.
        """
        if self.model_name is not None:
            tags.valid_name(self.model_name)
        if self.service_name is not None:
            tags.valid_name(self.service_name, "service_name")
        if self.model_version is not None:
            tags.valid_version(self.model_version)
        tags.valid_name(self.project_name, "project_name")
        if self.model_framework is not None:
            try:
                ModelFramework(self.model_framework)
            except ValueError as exc:
                allowed = ", ".join(framework.value for framework in ModelFramework)
                raise ConfigError(
                    f"model_framework {self.model_framework!r} is not one of {allowed}"
                ) from exc
        self._validate_values()

    def _validate_values(self) -> None:
        for name in ("include_patterns", "exclude_patterns"):
            patterns = getattr(self, name)
            if not isinstance(patterns, list | tuple) or not all(map(_is_text, patterns)):
                raise ConfigError(f"{name} must be a list of globs, not {patterns!r}")
        for name in ("labels", "metadata", "adapters"):
            if not isinstance(getattr(self, name), dict):
                raise ConfigError(f"{name} must be a dict, not {getattr(self, name)!r}")
        if self.description is not None and not _is_text(self.description):
            raise ConfigError(f"description must be text, not {self.description!r}")
        for key, value in self.labels.items():
            if not (_is_text(key) and _is_text(value)):
                raise ConfigError(f"labels must map text to text; {key!r} has {value!r}")
        for name in self.adapters:
            if name == BASE_NAME or tags.valid_name(name, "adapters") != name:
                raise ConfigError(
                    f"{name!r} is no name for an adapter; use a-z, 0-9, '-' and '_', and not "
                    f"{BASE_NAME!r}, which asks for the base model"
                )


class ModelPackager:
    """Packages one model as its `PackageConfig` says."""

    def __init__(self, config: PackageConfig) -> None:
        config.validate()
        self.config = config
        self._resolved: ResolvedModel | None = None
        self._model: StoredModel | None = None
        self._base: StoredModel | None = None
        self._adapters: dict[str, StoredModel] = {}
        self._warnings: list[str] = []
        self._left_out: list[str] = []
        self._new: list[str] = []

    @property
    def model_name(self) -> str:
        """The tag's name, as BentoML allows it."""
        return tags.valid_name(self._wanted_name)

    @property
    def renamed(self) -> dict[str, str]:
        """What the user wrote and what became of it, where a tag does not allow the former."""
        wanted = {
            self._wanted_name: self.model_name,
            self.config.model_version: self._version,
            self.config.service_name: self._service_name,
        }
        return {old: new for old, new in wanted.items() if old and new and old != new}

    def validate_model_path(self) -> Checkpoint:
        """Recognise what is at `model_path`; downloads it first when it is a hub id.

        Raises:
            ConfigError: no `model_path` is set.
            PackagingError: nothing is there, or it cannot be packaged; the message says why.
        """
        return self._resolve().checkpoint

    def collect_model_files(self) -> list[CheckpointFile]:
        """The files to store, ordered by path: the checkpoint's own, as the patterns change them.

        Raises:
            PackagingError: none is left, or a weight file that the model needs is excluded.
        """
        checkpoint = self.validate_model_path()
        files = stored_files(checkpoint, self.config.include_patterns, self.config.exclude_patterns)
        names = {file.relative_path for file in files}
        for weight_file in checkpoint.weight_files:
            if str(weight_file) not in names:
                raise PackagingError(
                    f"{weight_file} is needed but left out by the patterns; change "
                    "include_patterns or exclude_patterns",
                    "collect_model_files",
                    {"path": str(checkpoint.path), "file": str(weight_file)},
                )
        if taken := sorted(names & RESERVED_NAMES):
            raise PackagingError(
                f"the store keeps the name {taken[0]} for itself; rename the file or exclude it",
                "collect_model_files",
                {"path": str(checkpoint.path), "file": taken[0]},
            )
        return files

    def create_bento_model(self, progress: Progress | None = None) -> StoredModel:
        """Store the model; an adapter's base model becomes an entry of its own, once.

        Args:
            progress: called with each number of bytes that was read.

        Returns:
            The entry, with `tag`, `digest` and `path`.

        Raises:
            PackagingError: it cannot be stored. A base model that was stored before that stays, and
                the error names it.
        """
        with self._saying_what_stays():
            return self._create_bento_model(progress)

    def _create_bento_model(self, progress: Progress | None) -> StoredModel:
        self._resolved = None  # what was looked at before may have changed
        resolved = self._resolve()
        self._check_framework(resolved.checkpoint)
        files = self.collect_model_files()
        adapters = {
            name: _resolve_adapter(source, resolved.tag or resolved.path)
            for name, source in sorted(self.config.adapters.items())
        }
        self._resolved = resolved = self._check_loads(resolved, adapters)
        self._base = self._store_base(resolved, progress) if resolved.base else None
        for old, new in self.renamed.items():
            result_logger.warning("%r is no part of a tag; stored as %r", old, new)
        self._warnings, self._left_out = _notes(resolved, files, adapters)
        for warning in self._warnings:
            result_logger.warning("%s", warning)
        self._model = self._save(
            self.model_name,
            self._version,
            [(file.relative_path, file.path) for file in files],
            kind=resolved.checkpoint.kind.value,
            framework=self._framework(resolved.checkpoint),
            base=self._base,
            labels={**self.config.labels, "project": self.config.project_name},
            metadata=self._metadata(resolved),
            progress=progress,
            check=self._check_copy,
        )
        self._adapters = {
            name: self._store_adapter(name, source, self._model)
            for name, source in sorted(self.config.adapters.items())
        }
        return self._model

    def build_bento(self) -> bento.BuiltBento:
        """Build the Bento that serves the model; stores the model first when that was not done.

        Raises:
            PackagingError: no runner serves this kind of model yet, or other content has the tag.
        """
        with self._saying_what_stays():
            return self._build_bento()

    def _build_bento(self) -> bento.BuiltBento:
        self._check_servable()
        model = self._model or self.create_bento_model()
        built = bento.build(
            model,
            self._base,
            self._adapters,
            name=self._service_name,
            version=self._version,
            project_name=self.config.project_name,
            description=self.config.description or self.validate_model_path().description,
            labels=self.config.labels,
            service=self.config.service,
        )
        if built.created:
            self._new.append(f"the Bento {built.tag}")
        return built

    def package_model(
        self,
        build_bento: bool = True,
        create_docker: bool = False,
        tracking: TrackingClient | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Do it all.

        Args:
            build_bento: also build the Bento.
            create_docker: also build its container image; needs a container engine.
            tracking: the client whose run is given the tags and the digest.
            progress: called with each number of bytes that was read.

        Returns:
            `success` (True), `model_tag`, `model_digest`, `model_path`, `bento_tag` and
            `docker_image` (None where not asked for), `base_model_tag`, `adapter_tags` (by name),
            `parts` (the stored models: `model`, `base_model`, `adapter.NAME`, each with tag and
            digests), `project_name`, `description`, `num_files`, `size_bytes`, `renamed` (what had
            to be written differently in a tag), `left_out` (what lies in the folders and is not
            stored), `warnings` (what to know of the model, its base and its adapters), `unchanged`
            (all of it was there already), `tracking`.

        Raises:
            PackagingError: a step failed. What was stored before that is whole and stays: the error
                names it, and the next call uses it again.
        """
        self._new = []
        if build_bento:
            self._check_servable()
        elif create_docker:
            raise ConfigError("create_docker=True needs build_bento=True")
        if create_docker:
            bento.check_container_engine()
        with self._saying_what_stays():
            return self._package_model(build_bento, create_docker, tracking, progress)

    def _package_model(
        self,
        build_bento: bool,
        create_docker: bool,
        tracking: TrackingClient | None,
        progress: Progress | None,
    ) -> dict[str, Any]:
        model = self.create_bento_model(progress)
        built = self.build_bento() if build_bento else None
        result: dict[str, Any] = {
            "success": True,
            "model_tag": model.tag,
            "model_digest": model.digest,
            "model_path": str(model.path),
            "bento_tag": built.tag if built else None,
            "docker_image": bento.containerize(built.tag) if built and create_docker else None,
            "base_model_tag": self._base.tag if self._base else None,
            "adapter_tags": {name: entry.tag for name, entry in self._adapters.items()},
            "parts": {role: _part(entry) for role, entry in self._entries(model).items()},
            "project_name": self.config.project_name,
            "description": self.validate_model_path().description,
            "num_files": len(model.manifest.files),
            "size_bytes": model.manifest.size,
            "renamed": self.renamed,
            "left_out": self._left_out,
            "warnings": self._warnings,
            "unchanged": not model.created and not (built and built.created),
            "tracking": None,
        }
        if tracking is not None:
            result["tracking"] = tracking.link_package(result)
        return result

    def _save(self, *arguments: Any, **options: Any) -> StoredModel:
        """Store an entry, and remember it if it is new."""
        entry = ModelStore().save(*arguments, **options)
        if entry.created:
            self._new.append(f"the model {entry.tag}")
        return entry

    @contextlib.contextmanager
    def _saying_what_stays(self) -> Iterator[None]:
        """Whoever hears of a failure hears which new entries it leaves."""
        try:
            yield
        except BaseException as exc:
            new, self._new = self._new, []  # told once, however deep this is
            if not new:
                raise
            stays = (
                f"{' and '.join(new)} {'stay' if len(new) > 1 else 'stays'} in the store, to be "
                "used again"
            )
            if isinstance(exc, BentoMLError):
                details = {**exc.details, "stays": new}
                raise type(exc)(f"{exc.message}; {stays}", exc.operation, details) from exc
            logger.warning("%s", stays)  # Ctrl-C, too
            raise

    def _entries(self, model: StoredModel) -> dict[str, StoredModel]:
        """The stored models of the package, by their role in it."""
        base = {"base_model": self._base} if self._base else {}
        adapters = {f"adapter.{name}": entry for name, entry in self._adapters.items()}
        return {"model": model, **base, **adapters}

    @property
    def _wanted_name(self) -> str:
        if self.config.model_name is not None:
            return self.config.model_name
        path = expand(self.config.model_path or "")
        return path.resolve().name if path.exists() else str(path).partition("@")[0]

    @property
    def _version(self) -> str | None:
        version = self.config.model_version
        return tags.valid_version(version) if version is not None else None

    @property
    def _service_name(self) -> str:
        name = self.config.service_name
        return tags.valid_name(name, "service_name") if name is not None else self.model_name

    def _resolve(self) -> ResolvedModel:
        path = self.config.model_path
        if path is None or not str(path):
            raise ConfigError("PackageConfig.model_path is not set: name the folder to package")
        if self._resolved is None:
            is_path = expand(path).exists()
            if not is_path and not (isinstance(path, str) and references.is_hub_id(path)):
                raise PackagingError(
                    f"{path} does not exist: give the folder that the training wrote",
                    "validate_model_path",
                    {"path": str(path)},
                )
            resolved = references.resolve(path, base_model=self.config.base_model)
            if resolved.is_adapter and self.config.adapters:
                raise ConfigError(f"adapters belong to a full model, and {path} is an adapter")
            _check_adapter(resolved)
            self._resolved = resolved
        return self._resolved

    def _framework(self, checkpoint: Checkpoint) -> str:
        wanted = self.config.model_framework
        return ModelFramework(wanted).value if wanted is not None else checkpoint.framework

    def _check_framework(self, checkpoint: Checkpoint) -> None:
        """A language model in safetensors is both MLX's and Transformers'; others are one thing."""
        wanted = self._framework(checkpoint)
        either = {ModelFramework.MLX.value, ModelFramework.TRANSFORMERS.value}
        if wanted != checkpoint.framework and not {wanted, checkpoint.framework} <= either:
            raise PackagingError(
                f"model_framework is {wanted!r}, but {checkpoint.path} is {checkpoint.description}",
                "validate_model_path",
                {"path": str(checkpoint.path), "framework": checkpoint.framework},
            )

    def _check_servable(self) -> None:
        checkpoint = self.validate_model_path()
        if checkpoint.kind not in SERVED_KINDS:
            raise PackagingError(
                f"{checkpoint.path} is {checkpoint.description}: this version stores such models "
                "but does not serve them; package it with build_bento=False",
                "build_bento",
                {"path": str(checkpoint.path), "kind": checkpoint.kind.value},
            )
        resolved = self._resolve()
        language_model = (resolved.base or resolved).checkpoint
        if not language_model.has_tokenizer:
            raise PackagingError(
                f"{language_model.path} has no tokenizer, so it cannot be served: put "
                "tokenizer.json and tokenizer_config.json beside its weights",
                "build_bento",
                {"path": str(language_model.path)},
            )

    def _check_loads(
        self, resolved: ResolvedModel, adapters: dict[str, ResolvedModel]
    ) -> ResolvedModel:
        """Refuse what could not be served; what there is to know is added to its warnings."""
        checkpoint = resolved.checkpoint
        if resolved.base is not None:
            found = check_loads(resolved.base.checkpoint, checkpoint)
        else:
            found = check_loads(checkpoint, *(one.checkpoint for one in adapters.values()))
        warnings = [*checkpoint.warnings, *found]
        return replace(resolved, checkpoint=replace(checkpoint, warnings=tuple(warnings)))

    def _check_copy(self, folder: Path) -> None:
        """Look at the stored files as at any checkpoint: patterns or others changed them."""
        original = self.validate_model_path()
        copy = recognise(folder)
        if any(getattr(copy, fact) != getattr(original, fact) for fact in _KEPT_BY_A_COPY):
            raise PackagingError(
                f"what would be stored of {original.path} is {copy.description}, and not "
                f"{original.description}: change include_patterns or exclude_patterns",
                "create_bento_model",
                {"path": str(original.path)},
            )
        if self.config.include_patterns or self.config.exclude_patterns:
            check_loads(copy)  # without what they left out

    def _metadata(self, resolved: ResolvedModel) -> dict[str, Any]:
        metadata = dict(self.config.metadata)
        if self.config.description:
            metadata.setdefault("description", self.config.description)
        if resolved.revision:
            metadata.setdefault("source", resolved.revision)
        return metadata

    def _store_base(self, adapter: ResolvedModel, progress: Progress | None) -> StoredModel:
        """The store's entry for an adapter's base: the one it came from, or a new one."""
        base = adapter.base
        if base is None:
            raise PackagingError("an adapter needs its base model", "create_bento_model")
        if base.tag is not None:
            return ModelStore().get(base.tag)
        name = base.revision.partition("@")[0] if base.revision else base.path.name
        return self._save(
            tags.valid_name(name, "base_model"),
            None,
            _sources(base),
            kind=base.checkpoint.kind.value,
            framework=base.checkpoint.framework,
            labels={"project": self.config.project_name, "role": "base"},
            metadata={"source": base.revision} if base.revision else {},
            progress=progress,
            reuse=True,
        )

    def _store_adapter(self, name: str, source: str | Path, model: StoredModel) -> StoredModel:
        """The store's entry for one of `config.adapters`, with `model` as its base."""
        adapter = _resolve_adapter(source, model.tag)
        if adapter.tag is not None:
            return ModelStore().get(adapter.tag)
        return self._save(
            tags.valid_name(f"{self.model_name}-{name}", "adapters"),
            None,
            _sources(adapter),
            kind=adapter.checkpoint.kind.value,
            framework=adapter.checkpoint.framework,
            base=model,
            labels={"project": self.config.project_name},
            reuse=True,
        )


def _sources(model: ResolvedModel) -> list[tuple[str, Path]]:
    """What of a model is stored, as the store takes it."""
    return [(file.relative_path, file.path) for file in stored_files(model.checkpoint)]


def _notes(
    model: ResolvedModel, files: list[CheckpointFile], adapters: dict[str, ResolvedModel]
) -> tuple[list[str], list[str]]:
    """Warnings of a model, its base and its adapters; and what of their folders is not stored."""
    others = {"base model": model.base} if model.base else {}
    others |= {f"adapter {name}": adapter for name, adapter in adapters.items()}
    warnings = list(model.checkpoint.warnings)
    names = list(left_out(model.checkpoint, files))
    for role, other in others.items():
        warnings += [f"{role}: {warning}" for warning in other.checkpoint.warnings]
        if other.tag is None:  # what is stored already is linked as it is
            names += [f"{role}: {name}" for name in other.checkpoint.left_out]
    return warnings, names


def _part(entry: StoredModel) -> dict[str, str]:
    """What MLflow is told of a stored model; a label or metadata may name the run it is from."""
    run_id = entry.labels.get(RUN_LABEL) or entry.metadata.get(RUN_LABEL)
    return {
        "tag": entry.tag,
        "digest": entry.digest,
        "files_digest": entry.manifest.files_digest,
        **({"run_id": str(run_id)} if run_id else {}),
    }


def _is_text(value: object) -> bool:
    """True for a string that can be written as UTF-8."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _resolve_adapter(source: str | Path, base: str | Path) -> ResolvedModel:
    """Find one of `config.adapters` and check that it belongs to `base`."""
    adapter = references.resolve(source, base_model=base)
    _check_adapter(adapter)
    return adapter


def _check_adapter(adapter: ResolvedModel) -> None:
    """Refuse an adapter that does not fit its base, or does nothing."""
    if adapter.base is None:
        return
    check_adapter_fits(adapter.checkpoint, adapter.base.checkpoint)
    check_copies(adapter.checkpoint, adapter.base.checkpoint)
    check_finite(adapter.checkpoint)
    if adapter_delta_is_zero(adapter.checkpoint):
        raise PackagingError(
            f"the adapter {adapter.path} changes nothing: all its B matrices are zero, as before "
            "training",
            "validate_model_path",
            {"path": str(adapter.path)},
        )


def package_model(
    model_path: str | Path,
    model_name: str | None = None,
    project_name: str = "default",
    *,
    model_framework: ModelFramework | str | None = None,
    build_bento: bool = True,
    create_docker: bool = False,
    tracking: TrackingClient | None = None,
    progress: Progress | None = None,
    **config: Any,
) -> dict[str, Any]:
    """Package a model in one call.

    Args:
        config: further fields of `PackageConfig`.

    Returns:
        What `ModelPackager.package_model` returns: `result["model_tag"]`, `result["bento_tag"]`, …

    Raises:
        ConfigError: `config` names a field that there is not, or a value that is not allowed.
        BentoMLError: packaging failed; carries `operation` and `details`.
    """
    given: dict[str, Any] = {
        "model_path": model_path,
        "model_name": model_name,
        "project_name": project_name,
        "model_framework": model_framework,
    }
    packager = ModelPackager(PackageConfig(**given, **config))
    return packager.package_model(build_bento, create_docker, tracking, progress)
