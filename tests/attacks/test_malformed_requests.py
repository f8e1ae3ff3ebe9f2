"""Requests whose head HTTP does not allow: refused on every route, whoever would answer it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from live_server import LiveServer, read_until
from mlops.serving.http import RunnerHost

ROUTES = ("GET /livez", "GET /readyz", "GET /health", "GET /metrics", "GET /v1/models", "GET /docs")
UNKNOWN = ("GET /nothing", "POST /predict", "POST /v1/completions")
HOST = b"Host: localhost\r\n"


class Silent:
    """A runner that nobody gets to ask."""

    is_loaded = True

    def load_model(self) -> None: ...

    def unload_model(self) -> None: ...

    def predict(self, input_data: Any) -> dict[str, Any]:
        return {}

    def predict_batch(self, inputs: Any) -> list[Any]:
        return [{} for _ in inputs]

    def get_memory_usage(self) -> dict[str, Any]:
        return {"total_mb": 0.0, "mlx_available": False}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer(RunnerHost(Silent)) as server:
        yield server


def status_of(server: LiveServer, route: str, version: str, headers: bytes) -> int:
    head = f"{route} HTTP/{version}\r\nConnection: close\r\nContent-Length: 0\r\n".encode()
    with server.connection(head + headers + b"\r\n") as connection:
        return int(read_until(connection, b"\r\n").split()[1])


@pytest.mark.parametrize("route", ROUTES + UNKNOWN)
@pytest.mark.parametrize(
    ("version", "headers"),
    [
        ("1.1", b""),
        ("1.1", HOST + HOST),
        ("1.1", HOST + b"X-Between: 1\r\nHOST: other.example\r\n"),
        ("1.0", HOST + HOST),
    ],
)
def test_no_host_and_two_hosts_are_refused(
    server: LiveServer, route: str, version: str, headers: bytes
) -> None:
    assert status_of(server, route, version, headers) == 400


@pytest.mark.parametrize(("version", "headers"), [("1.1", HOST), ("1.0", HOST), ("1.0", b"")])
def test_one_host_and_old_requests_without_are_answered(
    server: LiveServer, version: str, headers: bytes
) -> None:
    assert [status_of(server, route, version, headers) for route in ROUTES] == [200] * len(ROUTES)


def test_the_refusal_says_what_is_wrong(server: LiveServer) -> None:
    with server.connection(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n") as connection:
        assert b"a request has one Host header, not 0" in read_until(connection, b"}}")
