"""Options that several commands have, and how their texts are checked."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import typer

from mlops.hardware.home import expand

HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}


def examples(*commands: str) -> str:
    """The end of a command's help. `\\b` keeps each command on a line of its own."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


def adapters_by_name(given: Iterable[str]) -> dict[str, str | Path]:
    """What `--adapter NAME=PATH` says; a path as it is from any folder, a tag or hub id as given.

    Raises:
        typer.BadParameter: something else stands there, or a name twice.
    """
    adapters: dict[str, str | Path] = {}
    for name, place in pairs(given, "--adapter", "NAME=PATH").items():
        if not place:
            raise typer.BadParameter(f"--adapter {name}= names no folder, tag or hub id")
        path = expand(place)
        adapters[name] = path.resolve() if path.exists() else place
    return adapters


def pairs(given: Iterable[str], option: str, form: str) -> dict[str, str]:
    """What an option that takes `KEY=VALUE` says, each time that it is given.

    Args:
        form: how the help writes `KEY=VALUE`.

    Raises:
        typer.BadParameter: something else stands there, or a key twice.
    """
    found: dict[str, str] = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not (key and equals):
            raise typer.BadParameter(f"{option} takes {form}, not {item!r}")
        if key in found:
            raise typer.BadParameter(f"{option} names {key!r} twice: leave one of the two out")
        found[key] = value
    return found
