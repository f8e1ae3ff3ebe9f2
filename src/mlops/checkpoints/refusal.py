"""The one error that this package raises: a checkpoint is refused, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlops.errors import PackagingError


def refusal(
    message: str, path: str | Path, operation: str = "recognise", **details: Any
) -> PackagingError:
    """The error to raise for what is at `path`; `details` are JSON types."""
    return PackagingError(printable(message), operation, {"path": printable(str(path)), **details})


def examples(names: list[str], limit: int = 3) -> str:
    """The first few of some names as text: `a, b, c and 9 more`."""
    shown = ", ".join(name if name.isprintable() else repr(name) for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def printable(text: str) -> str:
    """For a terminal or a log: names on disk may hold line breaks and bytes that are no text."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
