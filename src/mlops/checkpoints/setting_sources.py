"""What the settings of `config.json` mean, taken from the sources of transformers and of mlx-lm.

transformers' configuration classes say which settings an architecture has and what they are when
the file leaves them out; its models say which of them the computation reads. mlx-lm's classes say
which of them it reads, and its own defaults. Both are parsed, never imported: that takes seconds,
and would run code of the libraries on what somebody else wrote.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from mlops.checkpoints import architectures

UNKNOWN = object()
"""A default that is not a literal."""

_READ = re.compile(r"\bconfig\.(\w+)|getattr\(\s*(?:\w+\.)*\w*config, \"(\w+)\"")
_IMPORTED = re.compile(r"^from \.(\w*) import ([\w, ]+)", re.MULTILINE)
_MODEL_TYPE = re.compile(r"^    model_type = \"([\w.-]+)\"", re.MULTILINE)
_ARGUMENTS = re.compile(r"(Args|Config)$")


@dataclass(frozen=True)
class Field:
    """One setting of a class.

    Attributes:
        types: what it may be: `int`, `str`, `list`, `any`, …, in lower case.
        default: the value when it is left out; `UNKNOWN` when no literal says.
        is_required: the architecture's own class has no default for it.
    """

    types: frozenset[str]
    default: Any = UNKNOWN
    is_required: bool = False


@dataclass(frozen=True)
class Settings:
    """The settings that one library has for an architecture.

    Attributes:
        fields: by name.
        read: names of those that change what its model computes.
        aliases: other names of settings: `num_experts` for `num_local_experts`.
        source: of the model.
    """

    fields: Mapping[str, Field] = field(default_factory=dict)
    read: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    source: str = ""

    def default(self, name: str) -> Any:
        """The value of a setting that is left out; None where it is not known."""
        found = self.fields.get(name)
        return None if found is None or found.default is UNKNOWN else found.default


@cache
def of_transformers(model_type: str) -> Settings | None:
    """The settings that transformers has for it, or None when it does not know the architecture."""
    file = _configuration_files().get(model_type)
    if file is None:
        return None
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and model_type in _assigned(node, "model_type"):
            model = "\n".join(
                part.read_text(encoding="utf-8")
                for part in sorted(file.parent.glob("modeling_*.py"))
            )
            names = {name for pair in _READ.findall(model) for name in pair if name}
            aliases: dict[str, str] = next(iter(_assigned(node, "attribute_map")), {})
            return Settings(dict(_fields(node)), frozenset(names), aliases, model)
    return None


@cache
def of_mlx_lm(module: str) -> Settings:
    """The settings that a module of `mlx_lm.models` reads, and the modules that it builds on."""
    sources = _with_imports(module, {})
    fields: dict[str, Field] = {}
    for name, source in reversed(sources.items()):
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and _ARGUMENTS.search(node.name):
                for key, each in _fields(node):
                    fields[key] = replace(each, is_required=each.is_required and name == module)
    text = "\n".join(sources.values())
    names = {name for name in fields if re.search(rf"\.{name}\b|\"{name}\"", text)}
    return Settings(fields, frozenset(names), {}, text)


def _with_imports(module: str, found: dict[str, str]) -> dict[str, str]:
    """Sources by module: its own, then those of the modules beside it that it imports."""
    file = architectures.models_folder() / f"{module}.py"
    if module in found or not file.is_file():
        return found
    found[module] = source = file.read_text(encoding="utf-8")
    for package, names in _IMPORTED.findall(source):
        for name in [package] if package else re.findall(r"\w+", names):
            _with_imports(name, found)
    return found


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, Field]]:
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            default = UNKNOWN if statement.value is None else _literal(statement.value)
            types = frozenset(_types(statement.annotation))
            yield statement.target.id, Field(types, default, statement.value is None)


def _types(annotation: ast.expr) -> Iterator[str]:
    """`int`, `none` of `int | None`; `list` of `Optional[List[str]]`."""
    match annotation:
        case ast.BinOp(left=left, right=right):
            yield from _types(left)
            yield from _types(right)
        case ast.Subscript(value=ast.Name("Optional" | "Union"), slice=ast.Tuple(elts=parts)):
            for part in parts:
                yield from _types(part)
        case ast.Subscript(value=ast.Name("Optional"), slice=part):
            yield from _types(part)
        case ast.Subscript(value=ast.Name(name)) | ast.Name(name):
            yield name.lower()


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):  # interval(min=0.0, max=1.0)(default=0.02)
        for keyword in node.keywords:
            if keyword.arg == "default":
                return _literal(keyword.value)
    if isinstance(node, ast.Tuple | ast.List):
        parts = [_literal(part) for part in node.elts]
        return UNKNOWN if UNKNOWN in parts else parts
    if ast.unparse(node) == "float('inf')":
        return math.inf
    try:
        return ast.literal_eval(node)
    except ValueError:
        return UNKNOWN


def _assigned(node: ast.ClassDef, name: str) -> list[Any]:
    return [
        _literal(statement.value)
        for statement in node.body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and statement.targets[0].id == name
    ]


@cache
def _configuration_files() -> dict[str, Path]:
    """transformers' `configuration_*.py` by `model_type`."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return {}
    files = {}
    for file in sorted((Path(spec.origin).parent / "models").glob("*/configuration_*.py")):
        for model_type in _MODEL_TYPE.findall(file.read_text(encoding="utf-8")):
            files[model_type] = file
    return files
