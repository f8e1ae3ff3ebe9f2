"""Who may ask, and how much: API keys, limits for each client, and web pages of other origins.

A client is the owner of an API key or, where there are no keys, an address. (An IPv6 address counts
with all of its /64, since one machine has them all.) Each worker process counts by itself. Behind a
proxy every request has the proxy's address, unless the server trusts the proxy's headers: uvicorn
does so for the addresses in `FORWARDED_ALLOW_IPS`, 127.0.0.1 by default. Nothing here reads
`X-Forwarded-For`, which anybody can send.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from mlops.errors import ConfigError
from mlops.hardware.home import expand
from mlops.serving.http import docs_page
from mlops.serving.http.errors import Failures
from mlops.serving.http.hosts import Hosts
from mlops.serving.http.limits import Limits
from mlops.serving.http.paths import client_of, is_handed_over, route_path
from mlops.serving.http.records import record_of
from mlops.serving.http.settings import HTTPSettings

logger = logging.getLogger(__name__)

KEYS_VARIABLE = "MLOPS_API_KEYS"
MIN_KEY_LENGTH = 16
MAX_KEYS = 1000
MAX_FILE_BYTES = 1024 * 1024
PROBES = frozenset({"/health", "/livez", "/readyz", "/healthz"})
"""`/healthz` is BentoML's."""

_EXPOSED_HEADERS = ("X-Request-Id", "Retry-After")


def guards(
    settings: HTTPSettings, limits: Limits | None = None, paths: Collection[str] = frozenset()
) -> list[Middleware]:
    """What stands before the routes, outermost first: as little as the settings need.

    Args:
        limits: of each client, where they may change; otherwise those of the settings.
        paths: of routes that never redirect.
    """
    chain = [Middleware(Failures), Middleware(Hosts, settings=settings, paths=paths)]
    if settings.cors_origins:
        # Outermost: a browser hides an error from its page when the headers are missing. A page
        # sends its key itself, never a cookie, so any header and method may be asked for.
        cors = Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_EXPOSED_HEADERS,
        )
        chain.insert(0, cors)
    asked = (settings.requests_per_minute, settings.max_concurrent_requests)
    if limits is not None or settings.api_keys or any(limit is not None for limit in asked):
        chain.append(Middleware(Access, settings=settings, limits=limits))
    return chain


class Access:
    """ASGI middleware: lets in who has a key and has not asked too much.

    Open to all, and without limits, are GET and HEAD of the probes and of the pages that describe
    the API; what else BentoML or a user adds is never open.
    It raises an `HTTPException`, which `Failures` in front of it answers.
    """

    def __init__(self, app: ASGIApp, settings: HTTPSettings, limits: Limits | None = None) -> None:
        self._app = app
        self._keys = Keys(settings.api_keys)
        asked = (settings.requests_per_minute, settings.max_concurrent_requests)
        self._limits = Limits(*asked) if limits is None else limits
        self._open_paths = PROBES | docs_page.PATHS if settings.enable_docs else PROBES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_open(scope) or is_handed_over(scope):
            if name := client_of(scope):
                record_of(scope).client = name
            await self._app(scope, receive, send)
            return
        try:
            name = self._keys.owner(scope["headers"]) if self._keys else _network(scope)
            record_of(scope).client = name
            client = self._limits.enter(name)
        except HTTPException as exc:
            if scope["type"] == "http":
                raise
            await send({"type": "websocket.close", "code": 1008, "reason": exc.detail})
            return
        try:
            await self._app(scope, receive, send)
        finally:
            self._limits.leave(client)

    def _is_open(self, scope: Scope) -> bool:
        is_read = scope["type"] == "http" and scope["method"] in {"GET", "HEAD"}
        return is_read and route_path(scope) in self._open_paths


class Keys:
    """The API keys of a service, as digests."""

    def __init__(self, keys: Iterable[str]) -> None:
        digests = [hashlib.sha256(key.encode()) for key in keys]
        self._owners = [(one.digest(), f"key-{one.hexdigest()[:8]}") for one in digests]

    def __bool__(self) -> bool:
        return bool(self._owners)

    def owner(self, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """A name for the owner of the key in a request: "key-" and 8 digits of its SHA-256.

        Args:
            headers: of the ASGI scope. `X-API-Key` wins over `Authorization: Bearer`, which may be
                meant for a proxy.

        Raises:
            HTTPException: 401, there is no key or it is not one of ours.
        """
        presented = _presented_key(headers)
        if presented is None:
            raise HTTPException(
                401,
                "this service needs an API key: send the header Authorization: Bearer KEY",
                {"WWW-Authenticate": "Bearer"},
            )
        digest = hashlib.sha256(presented).digest()
        found = None
        for known, name in self._owners:  # to the end: the time tells nothing
            if hmac.compare_digest(known, digest):
                found = name
        if found is None:
            raise HTTPException(
                401,
                "the API key is not one of this service's",
                {"WWW-Authenticate": 'Bearer error="invalid_token"'},
            )
        return found


def read_api_keys(path: str | None, environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The keys in the file (one on each line) and in `MLOPS_API_KEYS` (between commas).

    In the file, empty lines and lines that begin with `#` are passed over.

    Raises:
        ConfigError: the file cannot be read, one of the two holds no key or what cannot be one, or
            there are more than `MAX_KEYS`. It never says what a key is.
    """
    variables = os.environ if environ is None else environ
    keys: list[str] = []
    if KEYS_VARIABLE in variables:
        written = variables[KEYS_VARIABLE].split(",")
        keys += _checked(enumerate(written, 1), KEYS_VARIABLE, "key")
    if path is not None:
        lines = enumerate(_read(expand(path)).splitlines(), 1)
        keys += _checked(((n, one) for n, one in lines if one[:1] != "#"), path, "line")
    if len(keys) > MAX_KEYS:
        raise ConfigError(f"there are {len(keys)} API keys; at most {MAX_KEYS} are allowed")
    return tuple(dict.fromkeys(keys))


def _checked(written: Iterable[tuple[int, str]], source: str, part: str) -> Sequence[str]:
    """The keys among numbered parts of a text; a source without any would let everybody in."""
    keys = []
    for number, text in written:
        key = text.strip()
        if not key:
            continue
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise ConfigError(
                f"{source}, {part} {number}: an API key has visible ASCII characters only"
            )
        if len(key) < MIN_KEY_LENGTH:
            raise ConfigError(
                f"{source}, {part} {number}: an API key has at least {MIN_KEY_LENGTH} characters, "
                f"this one has {len(key)}"
            )
        keys.append(key)
    if not keys:
        raise ConfigError(f"{source} holds no API key: put one in, or do without {source}")
    return keys


def _read(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # a pipe would keep us waiting, a device has no end
            raise ConfigError(f"the API keys' {path} is not a file")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ConfigError(f"the API keys' {path} is over {MAX_FILE_BYTES} bytes")
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as exc:
        if isinstance(exc, ConfigError):
            raise
        # The text of a UnicodeDecodeError would repeat what is in the file.
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"the API keys in {path} cannot be read: {reason}") from None
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        logger.warning("others on this machine can read the API keys in %s: chmod 600 it", path)
    return text


def _presented_key(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    bearer = None
    for name, value in headers:
        if name == b"x-api-key":
            return value.strip()
        if name == b"authorization":
            scheme, _, token = value.strip().partition(b" ")
            if scheme.lower() == b"bearer":
                bearer = token.strip()
    return bearer


def _network(scope: Mapping[str, Any]) -> str:
    """Who asks, by address: an IPv4 address, or the network that a machine with IPv6 has."""
    client = scope.get("client")
    if not client:
        return "unknown"
    address: str = client[0]
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    if parsed.ipv4_mapped:
        return str(parsed.ipv4_mapped)
    return f"{ipaddress.IPv6Address(int(parsed) >> 64 << 64)}/64"
