"""Which path a request asks for, as routes are matched, and what else is read from its scope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlops.serving.http.records import record_of


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


_HANDED_OVER = "mlops.handed_over"


def is_handed_over(scope: Mapping[str, Any]) -> bool:
    """Whether another replica of this service has let this request in and sent it on to here."""
    return _HANDED_OVER in scope


def handed_over(scope: Mapping[str, Any]) -> dict[str, Any]:
    """What another replica is told of a request: plain values, and the mark: the client's name."""
    told = {name: scope[name] for name in _PLAIN_KEYS if name in scope}
    return {**told, _HANDED_OVER: record_of(scope).client}


def client_of(scope: Mapping[str, Any]) -> str:
    """Whom the other replica has let in."""
    return str(scope.get(_HANDED_OVER, ""))


LISTENS_ON = "mlops.listens_on"
"""In a scope: the addresses that the server listens on, where it says so."""


def listens_on(scope: Mapping[str, Any]) -> tuple[str, ...]:
    """The addresses that a request's server listens on; else the one that the client came by."""
    known = scope.get(LISTENS_ON) or (scope.get("server") or ("",))[:1]
    return tuple(str(address) for address in known)


_PLAIN_KEYS = (
    *("type", "http_version", "method", "scheme", "path", "raw_path", "query_string"),
    *("root_path", "headers", "client", "server"),
)
