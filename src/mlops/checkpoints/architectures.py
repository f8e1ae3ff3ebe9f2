"""Which architectures the installed mlx-lm has, found without importing it (that takes seconds)."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mlops.errors import MissingDependencyError

_HAS_MODEL = re.compile(r"^class Model\b|^from \S+ import .*\bModel\b|^Model\s*=", re.MULTILINE)


def is_supported(config: Mapping[str, Any]) -> bool:
    """True when mlx-lm has a model class for this `config.json`, whose `model_type` is text.

    Raises:
        MissingDependencyError: mlx-lm is not installed.
    """
    name = module_name(config)
    return name in modules() and bool(_HAS_MODEL.search(source(name)))


def module_name(config: Mapping[str, Any]) -> str:
    """The module of `mlx_lm.models` that is used for it, whether or not there is one."""
    model_type, named = str(config.get("model_type")), config.get("architectures")
    by_type, by_architecture = _remappings(_package_folder())
    names = [named] if isinstance(named, str) else named
    for architecture in names if isinstance(names, list) else ():
        if found := by_architecture.get((model_type, str(architecture))):
            return found
    return by_type.get(model_type, model_type)


@cache
def modules() -> dict[str, Path]:
    """The files of `mlx_lm.models`, by name.

    Raises:
        MissingDependencyError: mlx-lm is not installed.
    """
    return {file.stem: file for file in (_package_folder() / "models").glob("*.py")}


@cache
def source(module: str) -> str:
    """The text of one of them."""
    return modules()[module].read_text(encoding="utf-8")


@cache
def _package_folder() -> Path:
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or spec.origin is None:
        raise MissingDependencyError("mlx-lm")
    return Path(spec.origin).parent


@cache
def _remappings(package: Path) -> tuple[dict[str, str], dict[tuple[str, str], str]]:
    """The literal tables in `mlx_lm.utils`: other names of a `model_type`."""
    tables: dict[str, Any] = {}
    for node in ast.parse((package / "utils.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in {"MODEL_REMAPPING", "MODEL_ARCHITECTURE_REMAPPING"}:
                tables[name] = ast.literal_eval(node.value)
    return tables.get("MODEL_REMAPPING", {}), tables.get("MODEL_ARCHITECTURE_REMAPPING", {})
