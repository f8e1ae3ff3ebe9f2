"""Which architectures the installed mlx-lm has, found without importing it (that takes seconds)."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mlops.errors import MissingDependencyError

_HELPERS = frozenset({"base", "cache", "rope_utils", "switch_layers", "pipeline"})
_HAS_ROPE = re.compile(r"self\.rope = ")
_READS_INTO_ROPE = re.compile(r"self\.rope\.")
_HAS_MODEL = re.compile(r"^class Model\b|^from \S+ import .*\bModel\b|^Model\s*=", re.MULTILINE)


@dataclass(frozen=True)
class ModelClass:
    """What mlx-lm's class for an architecture reads of `config.json`, by its source.

    Attributes:
        modules: of mlx-lm, its own and those that it is made of.
        settings: names that its configuration has.
        required: those of them without a default.
        reads: names that its layers read, of attributes and of keys.
        has_rope: its attention calls a module `rope`, which another may stand in for.
    """

    modules: frozenset[str]
    settings: frozenset[str]
    required: frozenset[str]
    reads: frozenset[str]
    has_rope: bool


def is_supported(config: Mapping[str, Any]) -> bool:
    """True when mlx-lm has a model class for this `config.json`, whose `model_type` is text.

    Raises:
        MissingDependencyError: mlx-lm is not installed.
    """
    name = module_name(config)
    return name in _modules() and bool(_HAS_MODEL.search(_source(name)))


def find_model_class(config: Mapping[str, Any]) -> ModelClass | None:
    """What mlx-lm's class reads, its base classes and parts included; None without such a class."""
    name = _remapped(str(config.get("model_type")), config.get("architectures"))
    return _model_class(name) if name in _modules() else None


def source_mentions(config: Mapping[str, Any], word: str) -> bool:
    """True when the code that mlx-lm has for this `config.json` reads tensors of such a name.

    What it imports from other architectures counts: `kimi_k25` is `deepseek_v3` inside.
    """
    found = find_model_class(config)
    return found is not None and any(word in _source(module) for module in found.modules)


def module_name(config: Mapping[str, Any]) -> str:
    """The module of `mlx_lm.models` that is used for it, whether or not there is one."""
    return _remapped(config["model_type"], config.get("architectures"))


def models_folder() -> Path:
    """Where mlx-lm's model classes are.

    Raises:
        MissingDependencyError: mlx-lm is not installed.
    """
    return _package_folder() / "models"


def _remapped(model_type: str, architectures: Any) -> str:
    by_type, by_architecture = _remappings(_package_folder())
    names = [architectures] if isinstance(architectures, str) else architectures
    for architecture in names if isinstance(names, list) else ():
        if found := by_architecture.get((model_type, str(architecture))):
            return found
    return by_type.get(model_type, model_type)


@cache
def _modules() -> dict[str, Path]:
    """The sources in `mlx_lm.models`, by name."""
    return {file.stem: file for file in models_folder().glob("*.py")}


@cache
def _source(module: str) -> str:
    return _modules()[module].read_text(encoding="utf-8")


@cache
def _model_class(name: str) -> ModelClass:
    settings: set[str] = set()
    required: set[str] = set()
    reads: set[str] = set()
    sources, waiting = {}, [name]
    while waiting:
        module = waiting.pop()
        if module in sources or module in _HELPERS or module not in _modules():
            continue
        sources[module] = _source(module)
        tree = ast.parse(sources[module])
        for imported in ast.walk(tree):
            if isinstance(imported, ast.ImportFrom) and imported.level:
                names = [alias.name for alias in imported.names]
                waiting += [imported.module] if imported.module else names
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Args", "Config")):
                fields = _fields(node)
                settings |= fields.keys()
                required |= {field for field, is_required in fields.items() if is_required}
            else:
                reads |= _names(node)
    has_rope = any(
        _HAS_ROPE.search(source) and not _READS_INTO_ROPE.search(source)
        for source in sources.values()
    )
    return ModelClass(
        modules=frozenset(sources),
        settings=frozenset(settings),
        required=frozenset(required),
        reads=frozenset(reads),
        has_rope=has_rope,
    )


def _fields(arguments: ast.ClassDef) -> dict[str, bool]:
    """The names of a dataclass's fields, and whether each has to be given."""
    return {
        field.target.id: field.value is None
        for field in arguments.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


def _names(tree: ast.AST) -> set[str]:
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return found | {value for value in constants if isinstance(value, str)}


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
