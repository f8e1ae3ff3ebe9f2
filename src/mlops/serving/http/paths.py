"""Which path a request asks for, as routes are matched: without the prefix that a server adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def route_path(scope: Mapping[str, Any]) -> str:
    """The path of an ASGI scope below its `root_path`.

    The same as Starlette's router takes. What decides by a path must see what the router sees, or
    there is a way round it.
    """
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    below = path.removeprefix(root)
    return below if path.startswith(root) and (not below or below.startswith("/")) else path


def speaks_openai(scope: Mapping[str, Any]) -> bool:
    """Whether the client of this ASGI scope expects errors in OpenAI's form."""
    return route_path(scope).startswith("/v1/")
