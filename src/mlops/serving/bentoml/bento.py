"""Building the Bento that serves a stored model.

A Bento holds a `service.py` of a few lines, the pinned environment, the toolkit's own wheel, and
names its models by tag and digest. It is put together by BentoML in a staging folder and appears in
the store by one rename. No network is needed.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.metadata
import logging
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mlops.errors import PackagingError
from mlops.installation import DISTRIBUTION
from mlops.registry import ModelStore, StoredModel
from mlops.registry.blobs import store_failure
from mlops.registry.manifest import digest_of
from mlops.registry.readers import restrict
from mlops.registry.store import default_version, publish
from mlops.serving.bentoml.config import BentoMLConfig

logger = logging.getLogger(__name__)

DIGEST_LABEL = "mlops-digest"

_OPERATION = "build_bento"
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # the same files make the same wheel
_IMPORT_LOCK = threading.Lock()  # BentoML changes the working directory while it imports a service

_SERVICE = '''"""Serves {tag}; written when the Bento was built."""

from mlops.serving.bentoml.service import create_bentoml_service

svc = create_bentoml_service(
    {tag!r},
    digest={digest!r},
    model_type={model_type!r},
    service_name={name!r},
    project_name={project!r},
    adapters={adapters!r},
    config={config!r},
)
'''


@dataclass(frozen=True)
class BuiltBento:
    """A Bento in BentoML's store; `created` is False when the same one was there already."""

    tag: str
    path: Path
    digest: str
    created: bool


def build(
    model: StoredModel,
    base: StoredModel | None,
    adapters: Mapping[str, StoredModel],
    *,
    name: str,
    version: str | None,
    project_name: str,
    description: str,
    labels: Mapping[str, str],
    service: BentoMLConfig | None = None,
) -> BuiltBento:
    """Build the Bento of a stored model, or find the same one that was built before.

    Args:
        base: the entry of the base model, for an adapter.
        adapters: further adapters of the model, by the name that a request gives.
        name, version: valid parts of a tag; a version of None is made from the Bento's content.
        service: settings that the service starts with, other than its names.

    Raises:
        PackagingError: other content has the tag, or BentoML refused to build.
    """
    settings = service.to_dict() if service else {}
    for elsewhere in ("service_name", "project_name", "model_path", "model_name", "model_version"):
        settings.pop(elsewhere, None)
    source = _SERVICE.format(
        tag=model.tag,
        digest=model.digest,
        adapters={key: entry.reference for key, entry in sorted(adapters.items())},
        model_type="lora" if base else "mlx",
        name=name,
        project=project_name,
        config=settings,
    )
    store = ModelStore()
    with store.writing(), store.staging() as staging:
        try:
            return _build(
                store,
                staging,
                name,
                version,
                source=source,
                description=description,
                labels={**labels, "project": project_name},
                models=sorted({entry.tag for entry in (model, base, *adapters.values()) if entry}),
            )
        except OSError as exc:
            raise store_failure(exc, store.bentos) from exc


def _build(
    store: ModelStore,
    staging: Path,
    name: str,
    version: str | None,
    *,
    source: str,
    description: str,
    labels: dict[str, str],
    models: list[str],
) -> BuiltBento:
    requirements = pinned_requirements()
    context = staging / "context"
    context.mkdir()
    wheel = write_wheel(context)
    digest = digest_of(
        {
            "service": source,
            "requirements": requirements,
            "wheel": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        }
    )
    version = version or default_version(digest)
    tag = f"{name}:{version}"
    place = store.bentos / name / version
    if place.is_dir():
        return _keep(tag, place, digest)
    readers = store.readers_of_copies(
        store.models / model.replace(":", "/") / "model.yaml" for model in models
    )
    (context / "service.py").write_text(source, encoding="utf-8")
    built = _create(
        context,
        name=name,
        version=version,
        # BentoML would read a description that begins with "file:" from there.
        description=f" {description}" if description.startswith("file:") else description,
        labels={**labels, DIGEST_LABEL: digest},
        requirements=requirements,
        wheel=wheel,
        models=models,
    )
    built.chmod(context.stat().st_mode)  # BentoML made it with the mode of a temporary folder
    restrict(built, readers)
    if not publish(built, store.bentos, name, version):
        return _keep(tag, place, digest)
    return BuiltBento(tag, place, digest, created=True)


def check_container_engine() -> None:
    """Raise `PackagingError` unless one can be asked for an image."""
    try:
        subprocess.run(["docker", "info"], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as exc:
        raise PackagingError(
            "no container engine answers: start Docker and run the same again, or package without "
            "an image and run `bentoml containerize NAME:VERSION` where one is",
            "create_docker",
        ) from exc


def containerize(tag: str) -> str:
    """Build the container image of a Bento; returns the image's name, the Bento's tag.

    Raises:
        PackagingError: the image is not there afterwards.
    """
    import bentoml

    details = {"bento_tag": tag}
    try:
        bentoml.container.build(tag, backend="docker", image_tag=(tag,))
    except Exception as exc:
        raise PackagingError(
            f"BentoML could not build the image of {tag}: {type(exc).__name__}: {exc}",
            "create_docker",
            details,
        ) from exc
    # BentoML reports success for a build that failed: ask the engine.
    found = subprocess.run(["docker", "image", "inspect", tag], check=False, capture_output=True)
    if found.returncode != 0:
        raise PackagingError(
            f"the container engine did not build {tag}; its own output above says why, and "
            f"`bentoml containerize {tag}` tries again",
            "create_docker",
            details,
        )
    return tag


def pinned_requirements() -> list[str]:
    """The environment this process runs in, as far as the toolkit needs it: `name==version`.

    Distributions that only this platform has (its MLX backend) are left to MLX's own extra.
    """
    pins: dict[str, str] = {}
    waiting = [(DISTRIBUTION, "")]
    seen = set(waiting)
    while waiting:
        name, extra = waiting.pop()
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if name != DISTRIBUTION:
            pins[name] = f"{name}=={distribution.version}"
        for line in distribution.requires or []:
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            needed = canonicalize_name(requirement.name)
            for wanted in {"", *requirement.extras}:
                if (needed, wanted) not in seen:
                    seen.add((needed, wanted))
                    waiting.append((needed, wanted))
    mlx = pins.pop("mlx", None)
    platform_only = re.compile(r"mlx-(metal|cpu|cuda.*)|scipy-openblas32")
    lines = [pin for name, pin in sorted(pins.items()) if not platform_only.fullmatch(name)]
    if mlx is None:
        return lines
    version = mlx.partition("==")[2]
    return [
        *lines,
        f"mlx=={version}; sys_platform == 'darwin'",
        f"mlx[cpu]=={version}; sys_platform == 'linux'",
    ]


def write_wheel(folder: Path) -> Path:
    """Write this toolkit, as it is installed here, as a wheel; returns the file.

    The demo's model stays out. The same installed files give the same bytes.

    Raises:
        PackagingError: the toolkit is not installed as a distribution.
    """
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError as exc:
        raise PackagingError(
            f"{DISTRIBUTION} is not installed as a package: run `make setup` in its clone, or "
            "install its wheel",
            _OPERATION,
        ) from exc
    import mlops

    package = Path(mlops.__file__).parent
    info = f"{DISTRIBUTION.replace('-', '_')}-{distribution.version}.dist-info"
    contents = {
        f"mlops/{path.relative_to(package).as_posix()}": path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file()
        and "__pycache__" not in path.parts
        and "base_model" not in path.relative_to(package).parts
    }
    for name in ("METADATA", "entry_points.txt"):
        contents[f"{info}/{name}"] = (distribution.read_text(name) or "").encode()
    contents[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: {DISTRIBUTION}\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    ).encode()
    record = [f"{name},{_record_hash(data)},{len(data)}" for name, data in contents.items()]
    contents[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    wheel = folder / f"{DISTRIBUTION.replace('-', '_')}-{distribution.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            entry = zipfile.ZipInfo(name, _ZIP_TIME)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return wheel


def _record_hash(data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
    return f"sha256={digest.decode()}"


def _create(
    context: Path,
    *,
    name: str,
    version: str,
    description: str,
    labels: dict[str, str],
    requirements: list[str],
    wheel: Path,
    models: list[str],
) -> Path:
    """Let BentoML make the Bento's folder; returns it, on the store's file system."""
    from bentoml._internal.bento.bento import Bento
    from bentoml._internal.bento.build_config import BentoBuildConfig
    from bentoml._internal.configuration.containers import BentoMLContainer
    from bentoml.exceptions import BentoMLException

    config = BentoBuildConfig(
        service="service:svc",
        name=name,
        description=description,
        labels=labels,
        include=["service.py"],
        models=models,
        python={
            "packages": requirements,
            "lock_packages": False,  # locking asks the network; these are pinned already
        },
        docker={
            "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
            # MLX's wheel computes with a slow BLAS; this one takes its place (`mlops doctor`).
            "system_packages": ["libopenblas0-pthread"],
        },
    )
    try:
        with private_import():
            # Where BentoML would build it, nobody would remove what a killed process leaves.
            BentoMLContainer.tmp_bento_store_dir.set(str(context.parent))
            # "no_image" selects the layout whose env/python/wheels holds our wheel.
            bento = Bento.create(
                config, version=version, build_ctx=str(context), enabled_features=["no_image"]
            )
            built = context.parent / "bento"
            Path(bento.path).rename(built)
            # BentoML takes no wheel from below a hidden folder, and a store may lie there.
            wheel.rename(built / "env" / "python" / "wheels" / wheel.name)
    except (BentoMLException, ValueError) as exc:
        raise PackagingError(
            f"BentoML could not build {name}:{version}: {exc}",
            _OPERATION,
            {"bento_tag": f"{name}:{version}"},
        ) from exc
    finally:
        BentoMLContainer.tmp_bento_store_dir.reset()
    return built


@contextlib.contextmanager
def private_import() -> Iterator[None]:
    """Let BentoML import our `service.py` and leave no trace of that in this process.

    BentoML changes the working directory and the import path, and does not change them back when
    the import fails. A module of the user's that is called `service` too is kept aside.
    """
    with _IMPORT_LOCK:
        folder, path = Path.cwd(), list(sys.path)
        others = sys.modules.pop("service", None)
        try:
            yield
        finally:
            os.chdir(folder)
            sys.path[:] = path
            sys.modules.pop("service", None)
            if others is not None:
                sys.modules["service"] = others


def _keep(tag: str, place: Path, digest: str) -> BuiltBento:
    import bentoml

    details = {"bento_tag": tag, "path": str(place), "given": digest}
    try:
        stored = bentoml.bentos.get(tag).info.labels.get(DIGEST_LABEL)
    except Exception as exc:
        message = (
            f"the Bento {tag} is damaged: remove {place} and package again"
            if place.exists()
            else f"the Bento {tag} was deleted while it was looked at; package again"
        )
        raise PackagingError(message, _OPERATION, details) from exc
    if stored != digest:
        raise PackagingError(
            f"the Bento {tag} is taken by other content (another model, other settings or another "
            "environment); give this one another version",
            _OPERATION,
            {**details, "stored": stored},
        )
    return BuiltBento(tag, place, digest, created=False)
