"""What mlx-lm and transformers read of `config.json`, taken from their sources.

mlx-lm's class for an architecture ignores in silence what it does not know. transformers' classes
say which settings there are, and what they are when the file leaves them out. Both are parsed,
never imported: that takes seconds, and would run code of the libraries on what somebody else wrote.
Each architecture is parsed once in a process.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from mlops.checkpoints import architectures

UNKNOWN = object()
"""A default that is not a literal."""

_HELPERS = frozenset({"base", "cache", "rope_utils", "switch_layers", "pipeline"})
_ARGUMENTS = ("Args", "Config")
_HAS_ROPE = re.compile(r"self\.rope = ")
_READS_INTO_ROPE = re.compile(r"self\.rope\.")
_CONFIG_READ = re.compile(r"\bconfig\.(\w+)|getattr\(\s*(?:\w+\.)*\w*config, \"(\w+)\"")
_MODEL_TYPE = re.compile(r"^    model_type = \"([\w.-]+)\"", re.MULTILINE)


@dataclass(frozen=True)
class Field:
    """One setting of a configuration class.

    Attributes:
        types: what it may be: `int`, `str`, `list`, `any`, …, in lower case.
        default: the value when it is left out; `UNKNOWN` when no literal says.
        is_required: the architecture's own class has no default for it.
    """

    types: frozenset[str]
    default: Any = UNKNOWN
    is_required: bool = False


@dataclass(frozen=True)
class ModelSource:
    """What one library has for an architecture.

    Attributes:
        fields: the settings of its configuration, by name.
        reads: names that its layers read, of attributes and of keys.
        used: names of the fields that are read at all, by the configuration's own code too.
        aliases: other names of settings: `num_experts` for `num_local_experts`; of transformers.
        modules: its own and those that it is made of; of mlx-lm.
        has_rope: its attention calls a module `rope`, which another may stand in for; of mlx-lm.
        text: the source itself.
    """

    fields: Mapping[str, Field]
    reads: frozenset[str]
    used: frozenset[str]
    text: str
    aliases: Mapping[str, str]
    modules: frozenset[str] = frozenset()
    has_rope: bool = False

    def default(self, name: str) -> Any:
        """The value of a setting that is left out; None where it is not known."""
        found = self.fields.get(name)
        return None if found is None or found.default is UNKNOWN else found.default


@cache
def of_mlx_lm(module: str) -> ModelSource:
    """What a module of `mlx_lm.models` reads, its base classes and parts included.

    What it imports from other architectures counts: `kimi_k25` is `deepseek_v3` inside.
    """
    trees = _with_imports(module)
    texts = [architectures.source(name) for name in trees]
    fields: dict[str, Field] = {}
    reads: set[str] = set()
    prepared: set[str] = set()
    for name, tree in reversed(trees.items()):
        for node in tree.body:
            if not (isinstance(node, ast.ClassDef) and node.name.endswith(_ARGUMENTS)):
                reads |= _names([node])
                continue
            for key, each in _fields(node):
                fields[key] = replace(each, is_required=each.is_required and name == module)
            prepared |= _names(part for part in node.body if not isinstance(part, ast.AnnAssign))
    return ModelSource(
        fields,
        frozenset(reads),
        frozenset(fields.keys() & (reads | prepared)),
        "\n".join(texts),
        {},
        frozenset(trees),
        any(_HAS_ROPE.search(text) and not _READS_INTO_ROPE.search(text) for text in texts),
    )


@cache
def of_transformers(model_type: str) -> ModelSource | None:
    """What transformers has for it, or None when it does not know the architecture."""
    file = _configuration_file(model_type)
    if file is None:
        return None
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and model_type in _assigned(node, "model_type"):
            models = sorted(file.parent.glob("modeling_*.py"))
            text = "\n".join(model.read_text(encoding="utf-8") for model in models)
            reads = frozenset(name for pair in _CONFIG_READ.findall(text) for name in pair if name)
            aliases: dict[str, str] = next(iter(_assigned(node, "attribute_map")), {})
            return ModelSource(dict(_fields(node)), reads, reads, text, aliases)
    return None


def mlx_lm_mentions(config: Mapping[str, Any], word: str) -> bool:
    """True when the code that mlx-lm has for this `config.json` reads tensors of such a name."""
    name = architectures.module_name(config)
    return name in architectures.modules() and word in of_mlx_lm(name).text


def _with_imports(module: str) -> dict[str, ast.Module]:
    """Modules by name: it, and those beside it that it imports, helpers of all models left out."""
    trees: dict[str, ast.Module] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in trees or name in _HELPERS or name not in architectures.modules():
            continue
        trees[name] = ast.parse(architectures.source(name))
        for node in ast.walk(trees[name]):
            if isinstance(node, ast.ImportFrom) and node.level:
                waiting += [node.module] if node.module else [alias.name for alias in node.names]
    return trees


def _names(nodes: Iterable[ast.AST]) -> set[str]:
    """What is read in them: attributes, and texts, which may be keys."""
    found = set()
    for node in (each for tree in nodes for each in ast.walk(tree)):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
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


def _configuration_file(model_type: str) -> Path | None:
    """transformers' `configuration_*.py` with the class for it."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return None
    files = (Path(spec.origin).parent / "models").glob("*/configuration_*.py")
    # Nearly always it is in a folder of that name; to read all takes 40 ms.
    for file in sorted(files, key=lambda file: (not model_type.startswith(file.parent.name), file)):
        if model_type in _MODEL_TYPE.findall(file.read_text(encoding="utf-8")):
            return file
    return None
