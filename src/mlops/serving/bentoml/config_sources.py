"""Where a configuration's values come from besides arguments: a file and the environment.

Both give plain nested dicts; `config` checks every value and layers one over the other.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlops.errors import ConfigError
from mlops.serving.bentoml.config_values import CheckedFields, flag, not_allowed, unknown_name

MAX_FILE_BYTES = 1 << 20
ENVIRONMENT_PREFIX = "MLOPS_"

_MAX_YAML_DEPTH = 10

_BATCHING_FIELDS = ("enabled", "max_batch_size", "max_latency_ms")


def read_file(path: str | Path) -> dict[str, Any]:
    """The values in a YAML (`.yaml`, `.yml`) or TOML (`.toml`) file.

    Raises:
        ConfigError: the file cannot be read, is over 1 MiB, has another suffix or is not a table.
    """
    file = Path(path)
    parsers: dict[str, Callable[[str], Any]] = {
        ".yaml": _parse_yaml,
        ".yml": _parse_yaml,
        ".toml": tomllib.loads,
    }
    parse = parsers.get(file.suffix.lower())
    if parse is None:
        raise ConfigError(f"{file} is no configuration file: name it .yaml, .yml or .toml")
    if file.exists() and not file.is_file():  # a pipe would block, a folder has no text
        raise ConfigError(f"{file} is not a file; give the path of a configuration file")
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise ConfigError(f"{file} cannot be read ({exc.strerror}); check the path") from exc
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{file} is over 1 MiB, which no configuration file needs")
    try:
        values = parse(content.decode("utf-8"))
    except (ValueError, OverflowError, RecursionError) as exc:
        reason = str(exc).replace("\n", " ") or type(exc).__name__
        kind = file.suffix.lstrip(".").upper()
        raise ConfigError(f"{file} is not valid {kind}: {reason}") from exc
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds no table; write one 'field: value' a line")
    return values


def read_environment(
    fields: type[CheckedFields],
    sections: Mapping[str, type[CheckedFields]],
    environ: Mapping[str, str] | None,
) -> dict[str, Any]:
    """The values of `MLOPS_FIELD` and `MLOPS_SECTION__FIELD`; an empty variable counts as unset.

    Other `MLOPS_…` variables belong to other parts of the toolkit and are left alone.

    Args:
        environ: the variables; by default the process's.

    Raises:
        ConfigError: a variable's text is not what its field allows.
    """
    variables = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for variable, written in sorted(variables.items()):
        if not variable.startswith(ENVIRONMENT_PREFIX) or not written:
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        section, nested, nested_name = name.partition("__")
        if nested and section in sections:
            table = values.setdefault(section, {})
            table[nested_name] = _from_text(sections[section], nested_name, variable, written)
        elif fields.has_field(name) and name not in sections:
            values[name] = _from_text(fields, name, variable, written)
    return values


def flatten_batching(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with a bentofile's `runner: {batching: {…}}` turned into our fields.

    Raises:
        ConfigError: the block has an unknown key or contradicts a field beside it.
    """
    flat = dict(values)
    if "runner" not in flat:
        return flat
    runner = _table(flat.pop("runner"), "runner", ("batching",))
    batching = _table(runner.get("batching", {}), "runner.batching", _BATCHING_FIELDS)
    enabled = batching.pop("enabled", True)
    if not isinstance(enabled, bool):
        raise not_allowed("runner.batching.enabled", enabled, flag().allowed)
    if not enabled:
        batching["max_batch_size"] = 1
    for name, value in batching.items():
        if flat.setdefault(name, value) != value:
            allowed = f"{value!r} as runner.batching says, or leave one of the two out"
            raise not_allowed(name, flat[name], allowed)
    return flat


def _from_text(fields: type[CheckedFields], name: str, variable: str, written: str) -> Any:
    rule = fields.rule(name, written, shown_as=variable)
    try:
        return rule.accept(rule.parse(written))
    except ValueError:
        raise not_allowed(variable, written, rule.allowed) from None


def _table(value: Any, name: str, known: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise not_allowed(name, value, f"a table with {', '.join(known)}")
    for key, item in value.items():
        if key not in known:
            raise unknown_name(str(key), item, name, known)
    return dict(value)


def _parse_yaml(content: str) -> Any:
    import yaml

    try:
        depth = 0
        for event in yaml.parse(content):
            # A few nested aliases unfold into gigabytes; deep nesting is read in quadratic time.
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError("aliases (*name) are not allowed; write the value out")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_YAML_DEPTH:
                raise ConfigError(f"it nests more than {_MAX_YAML_DEPTH} levels deep")
        values = yaml.safe_load(content)
    except yaml.YAMLError as exc:
        raise ConfigError(str(exc)) from exc
    return {} if values is None else values
