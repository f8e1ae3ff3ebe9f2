"""BentoML's own description of an entry: written by BentoML, read without it.

To import BentoML takes a second and 60 MB, which a process that only reads can do without.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from mlops.errors import PackagingError
from mlops.registry.manifest import Manifest

MODULE = "mlops.registry"
"""What `model.yaml` names as the module that made an entry."""

MAX_BYTES = 2**20
MAX_DEPTH = 50

_PLAIN_TYPES = (bytes, int, float, date, type(None))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file of bounded size.

    Raises:
        Exception: there is none; PyYAML raises much more than its own errors.
    """
    import yaml

    with path.open("rb") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES} bytes")
    content = yaml.safe_load(text)  # libyaml is faster, but nested brackets make it crash
    if not isinstance(content, dict):
        raise TypeError(f"{path} is no mapping")
    return content


def plain(labels: Any, metadata: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """Labels and metadata, if they are text to text and plain values.

    YAML's aliases can make a short file into more values than fit in memory: they are counted.

    Raises:
        TypeError, ValueError: they are something else, or too many.
    """
    if not isinstance(labels, dict) or not isinstance(metadata, dict):
        raise TypeError("they must be mappings")
    if not all(isinstance(text, str) for item in labels.items() for text in item):
        raise TypeError("a label is no text")
    waiting: list[tuple[Any, int]] = [(labels, 0), (metadata, 0)]
    num_values = 0
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, dict | list | tuple):
            num_values += len(value)
            if num_values > MAX_BYTES or depth > MAX_DEPTH:
                raise ValueError("there are too many values, or too deep ones")
            inner = [*value, *value.values()] if isinstance(value, dict) else value
            waiting += [(one, depth + 1) for one in inner]
        elif isinstance(value, str):
            value.encode()  # raises for what is no Unicode
        elif not isinstance(value, _PLAIN_TYPES):
            raise TypeError(f"{type(value).__name__} is no plain type")
    return labels, metadata


def write_model_yaml(
    path: Path,
    tag: str,
    manifest: Manifest,
    labels: Mapping[str, str] | None,
    metadata: Mapping[str, Any] | None,
) -> None:
    """Write BentoML's own description of an entry, by BentoML's own class."""
    from bentoml import Tag
    from bentoml._internal.models.model import ModelContext, ModelInfo

    ours = {
        "digest": manifest.digest,
        "kind": manifest.kind,
        "framework": manifest.framework,
        "base_tag": manifest.base_tag,
    }
    try:
        info = ModelInfo(
            tag=Tag.from_taglike(tag),
            module=MODULE,
            labels=dict(labels or {}),
            options={},
            metadata={**(metadata or {}), "mlops": {k: v for k, v in ours.items() if v}},
            context=ModelContext(framework_name=manifest.framework, framework_versions={}),
            signatures={},
            api_version="v1",
        )
        plain(info.labels, info.metadata)  # or it could not be read again
        with path.open("w", encoding="utf-8") as file:
            info.dump(file)
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"they are longer than {MAX_BYTES} bytes")  # noqa: TRY301
    except (ValueError, TypeError, RecursionError) as exc:
        raise PackagingError(
            f"labels must be text and metadata plain values: {exc}",
            "create_bento_model",
            {"tag": tag},
        ) from exc
