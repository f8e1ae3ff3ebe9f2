"""Names that lead to a service and are not its own (DNS rebinding); redirects that repeat them."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from live_server import LONG_S, LiveServer, read_all
from mlops.serving.http import HTTPSettings, RunnerHost

FOREIGN = [
    "evil.example",
    "evil.example:3000",
    "EVIL.example",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "notlocalhost",
    "10.0.0.1",
    "[2001:db8::1]:3000",
    "0x7f.1.evil",
    "evil\x80\xff.example",
    "a" * 3000,
]
OWN = [
    "localhost",
    "LocalHost:9",
    "localhost.",
    "app.localhost:3000",
    "127.0.0.1",
    "127.8.9.1:80",
    "[::1]:3000",
    "[::ffff:127.0.0.1]",
]
PATHS = [
    ("GET", "/health"),
    ("GET", "/livez"),
    ("GET", "/metrics"),
    ("GET", "/docs"),
    ("GET", "/v1/models"),
    ("POST", "/predict"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/unload_lora_adapter"),
    ("GET", "/nowhere"),
]


class EchoRunner:
    """Says what it is told; there is nothing to load."""

    is_loaded = False

    def load_model(self) -> None:
        self.is_loaded = True

    def unload_model(self) -> None:
        self.is_loaded = False

    def predict(self, input_data: Any) -> dict[str, Any]:
        return {"prediction": input_data, "mlx_optimized": False, "model_type": "echo"}

    def predict_batch(self, inputs: Any) -> list[Any]:
        return [self.predict(one) for one in inputs]

    def get_memory_usage(self) -> dict[str, Any]:
        return {}


def serving(**settings: Any) -> LiveServer:
    return LiveServer(RunnerHost(EchoRunner), settings=HTTPSettings(**settings))


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with serving() as one:
        yield one


def ask(
    server: LiveServer, host: str | None, path: str = "/health", method: str = "GET", **how: Any
) -> httpx.Response:
    """Send a request, byte by byte as it is to be."""
    version, extra = how.get("version", "1.1"), how.get("headers", "")
    lines = [f"{method} {path} HTTP/{version}", "Connection: close", "Content-Length: 0"]
    if host is not None:
        lines.append(f"Host: {host}")
    head = "\r\n".join([*lines, *([extra] if extra else []), "", ""]).encode("latin-1")
    address = how.get("address", "127.0.0.1")
    with socket.create_connection((address, server.port), LONG_S) as connection:
        connection.sendall(head)
        received = read_all(connection)
    first, _, body = received.partition(b"\r\n\r\n")
    status, *headers = first.decode("latin-1").split("\r\n")
    return httpx.Response(
        int(status.split()[1]), headers=[tuple(one.split(": ", 1)) for one in headers], content=body
    )


@pytest.mark.parametrize("host", FOREIGN)
def test_a_service_for_this_machine_answers_to_no_other_name(server: LiveServer, host: str) -> None:
    response = ask(server, host)
    assert response.status_code == 421
    message = json.loads(response.content)["error"]["message"]
    assert "http.allowed_hosts" in message
    assert message.isascii() or "…" in message
    assert message.isprintable()
    assert len(message) < 400
    assert repr(host[:20])[:-1] in message or "\\x80" in message


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_that_holds_for_every_route(server: LiveServer, method: str, path: str) -> None:
    assert ask(server, "evil.example", path, method).status_code == 421


@pytest.mark.parametrize("host", OWN)
def test_this_machines_names_are_its_own(server: LiveServer, host: str) -> None:
    assert ask(server, host).status_code == 200


def test_http_1_0_without_a_host_is_answered(server: LiveServer) -> None:
    assert ask(server, None, version="1.0").status_code == 200
    assert ask(server, "evil.example", version="1.0").status_code == 421


def test_one_foreign_name_of_two_is_enough(server: LiveServer) -> None:
    for first, second in (("localhost", "evil.example"), ("evil.example", "localhost")):
        response = ask(server, first, version="1.0", headers=f"Host: {second}")
        assert response.status_code in {400, 421}


def test_other_headers_name_no_host(server: LiveServer) -> None:
    response = ask(server, "evil.example", headers="X-Forwarded-Host: localhost")
    assert response.status_code == 421


def test_names_that_are_allowed() -> None:
    with serving(allowed_hosts=("models.example.com", "*.internal")) as server:
        for host in ("models.example.com:80", "Models.Example.com.", "a.b.internal", "localhost"):
            assert ask(server, host).status_code == 200
        for host in ("example.com", "internal", "xinternal", "a.models.example.com"):
            assert ask(server, host).status_code == 421
    with serving(allowed_hosts=("*",)) as server:
        assert ask(server, "evil.example").status_code == 200


def test_a_list_holds_where_there_are_keys_too() -> None:
    with serving(api_keys=("k" * 16,)) as server:
        assert ask(server, "models.example.com").status_code == 200
    with serving(api_keys=("k" * 16,), allowed_hosts=("models.example.com",)) as server:
        assert ask(server, "models.example.com").status_code == 200
        assert ask(server, "evil.example").status_code == 421


def listening_everywhere(**settings: Any) -> LiveServer:
    server = serving(**settings)
    server.listener.close()
    server.listener = socket.create_server(("0.0.0.0", 0))  # noqa: S104
    server.port = server.listener.getsockname()[1]
    # Its thread has the socket in its arguments.
    server.thread._kwargs["sockets"] = [server.listener]  # type: ignore[attr-defined]
    return server


def own_address() -> str:
    """An address of this machine that others may know; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.2"
        address: str = one.getsockname()[0]
        return address


def test_a_service_for_others_answers_to_every_name() -> None:
    with listening_everywhere() as server:
        for address in ("127.0.0.1", own_address()):
            assert ask(server, "svc.cluster.local", address=address).status_code == 200


def test_probes_by_address_pass_a_list() -> None:
    with listening_everywhere(allowed_hosts=("models.example.com",)) as server:
        address = own_address()
        for path in ("/livez", "/readyz", "/health"):
            response = ask(server, f"{address}:{server.port}", path, address=address)
            assert response.status_code == 200
        assert ask(server, "evil.example", address=address).status_code == 421


@pytest.mark.parametrize(
    ("path", "location"),
    [
        ("/predict/", "/predict"),
        ("/v1/chat/completions/?a=b", "/v1/chat/completions?a=b"),
        ("/health/", "/health"),
        ("/docs/", "/docs"),
    ],
)
@pytest.mark.parametrize("host", ["evil.example", "evil.example:99", "a_b", "e\x80vil", ""])
def test_redirects_name_no_host(path: str, location: str, host: str) -> None:
    with serving(allowed_hosts=("*",)) as server:
        for version in ("1.1", "1.0"):
            response = ask(server, host, path, version=version)
            assert response.status_code == 307
            assert response.headers["location"] == location
