"""Clients that do not keep to the protocol, against a real `bentoml serve`."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving_process import BENTOML, LONG_S, ServingProcess

from gated_service import (
    GATE_VARIABLE,
    PADDING_VARIABLE,
    PAUSE_VARIABLE,
    request,
    write_gated_service,
)

GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
BODY = json.dumps({"prompt": "2"}).encode()
POST = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
COUNT = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
NUM_IDLE = 1000
NUM_STALLED = 64
MIB = 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServingProcess]:
    folder: Path = tmp_path_factory.mktemp("project")
    gate = write_gated_service(folder)
    # With long texts, what lies between a stream and a client that does not read is soon full.
    environment = {GATE_VARIABLE: str(gate), PAUSE_VARIABLE: "0", PADDING_VARIABLE: "2000"}
    with ServingProcess(
        [*BENTOML, "serve", "service:svc"], folder, folder / "home", **environment
    ) as server:
        yield server.wait_until_ready()


@contextlib.contextmanager
def connection(server: ServingProcess, *parts: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), LONG_S) as one:
        for part in parts:
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                one.sendall(part)
        yield one


def read_answers(one: socket.socket, number: int = 1) -> bytes:
    """What comes until so many answers have begun, or the connection is closed."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while received.count(b"HTTP/1.1 ") < number or b"\r\n\r\n" not in received:
            part = one.recv(65536)
            if not part:
                break
            received += part
    return received


def check_it_answers(server: ServingProcess) -> None:
    with connection(server, COUNT) as one:
        assert read_answers(one).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "sent",
    [
        b"\0" * 1000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20,  # a TLS greeting
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET  HTTP/1.1\r\n\r\n",
        b"get /livez HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/9.9\r\n\r\n",
        b"GET /livez HTTP/1.1\nHost: localhost\n\n",
        b"GET /li\0vez HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: local\0host\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n: empty\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nA B: c\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\n folded\r\n\r\n",
        b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Content-Length: 1e3\r\n\r\n",
        POST + b"Content-Length: +5\r\n\r\n",
        POST + b"Content-Length: 99999999999999999999999999\r\n\r\n",
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcdef\r\n",
        POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: gzip\r\n\r\n" + BODY,
        POST + b"Content-Length: 1\r\n\r\n" + BODY,
    ],
)
def test_malformed_requests(server: ServingProcess, sent: bytes) -> None:
    with connection(server, sent) as one:
        assert read_answers(one).startswith(b"HTTP/1.1 400")
    check_it_answers(server)


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (b"GET /livez HTTP/1.1\r\n\r\n", {400}),  # no Host
        (b"GET /livez\r\n\r\n", {200, 400}),  # no version
        (b"GET /livez HTTP/1.0\r\n\r\n", {200}),
        (b"GET http://elsewhere/livez HTTP/1.1\r\nHost: localhost\r\n\r\n", {200}),
        (b"GET /nowhere HTTP/1.1\r\nHost: [::\r\n\r\n", {400, 421}),
        (b"GET /nowhere HTTP/1.1\r\nHost: a b\xff:99999999\r\n\r\n", {400, 421}),
        (b"GET /%00 HTTP/1.1\r\nHost: localhost\r\n\r\n", {400, 404}),
        (b"GET /static_content/%00 HTTP/1.1\r\nHost: localhost\r\n\r\n", {400, 404}),
        (
            b"GET /static_content/..%2f..%2fetc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
            {400, 404},
        ),
        (b"GET /%ff%fe%ed%a0%80 HTTP/1.1\r\nHost: localhost\r\n\r\n", {400, 404}),
        (b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n", {400, 404}),
        (b"GET /livez?" + b"a=%ff&" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", {200}),
        (
            b"GET /livez?" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
            {200, 400, 431},
        ),
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 60_000 + b"\r\n\r\n", {200}),
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 5000 + b"\r\n", {200, 431}),
        (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", {400, 404, 405}),
        (b"DELETE /predict HTTP/1.1\r\nHost: localhost\r\n\r\n", {405}),
        (b"HEAD /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", {200}),
        (
            b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"
            b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
            {400, 403, 404, 426},
        ),
        (
            b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
            b"Upgrade: h2c\r\n\r\n",
            {200},
        ),
        (COUNT, {200}),
        (
            POST + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
            {200},
        ),
    ],
)
def test_unusual_requests(server: ServingProcess, sent: bytes, statuses: set[int]) -> None:
    with connection(server, sent) as one:
        answer = read_answers(one)
    assert int(answer.split()[1]) in statuses, answer
    check_it_answers(server)


def test_pipelined_requests_are_answered_in_their_order(server: ServingProcess) -> None:
    last = b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with connection(server, COUNT + GET + last) as one:
        received = b""
        while part := one.recv(65536):
            received += part
    statuses = [part[:3] for part in received.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"200", b"404"]


def test_expect_100_continue(server: ServingProcess) -> None:
    head = POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY)
    with connection(server, head) as one:
        assert one.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        one.sendall(BODY)
        assert read_answers(one).startswith(b"HTTP/1.1 200")


def test_a_body_byte_by_byte(server: ServingProcess) -> None:
    head, body = COUNT.split(b"\r\n\r\n")
    with connection(server, head + b"\r\n\r\n") as one:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number in range(len(body)):
            one.sendall(body[number : number + 1])
        assert read_answers(one).startswith(b"HTTP/1.1 200")


def test_many_that_send_nothing_do_not_keep_others_out(server: ServingProcess) -> None:
    begun = (b"", b"\r\n\r\n", GET[:-2], COUNT[:-2])
    with contextlib.ExitStack() as stack:
        for number in range(NUM_IDLE):
            stack.enter_context(connection(server, begun[number % len(begun)]))
        check_it_answers(server)
    check_it_answers(server)


def test_many_that_read_nothing(server: ServingProcess) -> None:
    """Each of them is sent text without an end; the others get theirs, and memory stays."""
    (worker,) = server.workers()
    with contextlib.ExitStack() as stack:
        for _ in range(NUM_STALLED):
            one = stack.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect(("127.0.0.1", server.port))
            one.sendall(request(stream=True))
            assert one.recv(1)
        finish_a_stream(server)
        before = worker.memory_info().rss
        for _ in range(20):
            finish_a_stream(server)
        grown = worker.memory_info().rss - before
    assert grown < 16 * MIB
    check_it_answers(server)


def finish_a_stream(server: ServingProcess) -> None:
    with connection(server, request(prompt="500", stream=True)) as one:
        received = b""
        while b"[DONE]" not in received:
            part = one.recv(65536)
            assert part
            received += part
    assert received.count(b"data: {") >= 2
