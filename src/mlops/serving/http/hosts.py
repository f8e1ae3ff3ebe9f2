"""Which names a service answers to; one `Host` in each request; redirects that repeat none.

A web page whose name leads to 127.0.0.1 (DNS rebinding) could ask a service that is meant for this
machine alone, as if it were the page's own server. What gives it away is the name in `Host`.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import quote, urlsplit

from starlette.datastructures import URL
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlops.serving.http.paths import is_handed_over, listens_on, route_path
from mlops.serving.http.settings import HTTPSettings

MAX_SHOWN = 80
_SAFE = ":/%#?=@[]!$&'()*+,;"
"""What Starlette leaves as it is in a `Location`."""


class Hosts:
    """ASGI middleware: refuses requests for hosts that are not this service's, with 421.

    Before that, with 400, those of HTTP/1.1 without a `Host`, and all with several: two let a proxy
    and the service disagree about whom is asked (RFC 9112, 3.2).

    With `allowed_hosts`, those are the names in it. Without, any name will do, unless the service
    has no keys and listens on this machine's own addresses (127.0.0.1, ::1) alone. (Where a server
    does not say what it listens on, the address that the client came by counts.) Always allowed
    are `localhost` and all below it, these addresses, and the one that the client has connected to.
    A request of HTTP/1.0 without `Host` is let in: no browser sends one.

    Args:
        paths: of routes that never redirect.
    """

    def __init__(
        self, app: ASGIApp, settings: HTTPSettings, paths: Collection[str] = frozenset()
    ) -> None:
        self._app = app
        self._paths = paths
        self._allowed = tuple(name.lower() for name in settings.allowed_hosts)
        self._has_keys = bool(settings.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) > 1 or (not hosts and scope.get("http_version") == "1.1"):
            await _refuse(400, f"a request has one Host header, not {len(hosts)}", scope, send)
            return
        if hosts and not is_handed_over(scope) and self._is_checked(scope):
            (host,) = hosts
            if not self._is_allowed(host, scope):
                await _refuse(421, _why(host), scope, send)
                return

        if route_path(scope) in self._paths:  # it does not redirect, and may send many events
            await self._app(scope, receive, send)
            return

        async def send_relative(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] // 100 == 3:
                message = {**message, "headers": _relative(scope, message.get("headers", ()))}
            await send(message)

        await self._app(scope, receive, send_relative)

    def _is_checked(self, scope: Scope) -> bool:
        if self._allowed:
            return True
        return not self._has_keys and all(is_loopback(one) for one in listens_on(scope))

    def _is_allowed(self, host: str, scope: Scope) -> bool:
        name = _name(host)
        if not name or name == "localhost" or name.endswith(".localhost") or is_loopback(name):
            return True
        if name == (scope.get("server") or ("",))[0]:
            return True
        return any(
            one in {"*", name} or (one.startswith("*.") and name.endswith(one[1:]))
            for one in self._allowed
        )


def _why(host: str) -> str:
    shown = ascii(host[:MAX_SHOWN]) + ("…" if len(host) > MAX_SHOWN else "")
    return (
        f"this service does not answer to the host {shown}: ask for it by its address, or let "
        "its operator add the name to http.allowed_hosts"
    )


async def _refuse(status: int, reason: str, scope: Scope, send: Send) -> None:
    if scope["type"] == "http":
        raise HTTPException(status, reason)
    await send({"type": "websocket.close", "code": 1008, "reason": "unknown host"})


def _name(host: str) -> str:
    """The name or address in a header `Host`, without the port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].removesuffix(".")


@functools.lru_cache(maxsize=1024)
def is_loopback(name: str) -> bool:
    """Whether this is an address of this machine alone."""
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return address.is_loopback


def _relative(scope: Mapping[str, Any], headers: Any) -> list[tuple[bytes, bytes]]:
    """Headers of an answer, where a redirect to this service names no host: it was the client's."""
    return [
        (name, _without_host(scope, value) if name.lower() == b"location" else value)
        for name, value in headers
    ]


def _without_host(scope: Mapping[str, Any], location: bytes) -> bytes:
    there = urlsplit(location.decode("latin-1"))
    own = quote(URL(scope=dict(scope)).netloc, safe=_SAFE)
    if not there.netloc or there.netloc != own:
        return location
    # Two slashes at the beginning would be a host again.
    path = "/" + there.path.lstrip("/")
    return there._replace(scheme="", netloc="", path=path).geturl().encode("latin-1")
