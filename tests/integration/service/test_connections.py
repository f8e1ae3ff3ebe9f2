"""Connections of a worker's uvicorn: heads without an end, clients that send or read nothing."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import pytest

from gated_service import request
from live_server import LiveServer, read_all, read_until, wait_for
from mlops.serving.bentoml.connections import MAX_HEAD_BYTES
from mlops.serving.http import RunnerHost
from mlops.serving.runner.base import TextChunk

LIVEZ = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
HARMLESS = b"x" * 4096
SOON = {"head_s": 0.3, "stalled_s": 0.5, "look_every_s": 0.05}


class Endless:
    """Text without an end; the whole answer is a long one."""

    def __init__(self) -> None:
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    async def begun(self) -> None:
        pass

    async def chunks(self) -> AsyncIterator[TextChunk]:
        while not self.is_cancelled:
            yield TextChunk(0, "x" * 1000)
            await asyncio.sleep(0)

    async def prediction(self) -> dict[str, Any]:
        return {"prediction": "x" * 30_000_000, "finish_reason": "stop"}


class EndlessRunner:
    """Counts nothing, computes nothing."""

    can_generate = True

    def __init__(self) -> None:
        self.is_loaded = False
        self.under_way: list[Endless] = []

    def load_model(self) -> None:
        self.is_loaded = True

    def unload_model(self) -> None:
        self.is_loaded = False

    def generate(self, _: Mapping[str, Any], *, deadline_s: float | None = None) -> Endless:
        self.under_way.append(Endless())
        return self.under_way[-1]

    def token_bytes(self, token_ids: Sequence[int], adapter: str | None = None) -> list[bytes]:
        return [b"" for _ in token_ids]

    def statistics(self) -> dict[str, Any]:
        return {}

    def predict(self, _: Any) -> dict[str, Any]:
        return {}

    def predict_batch(self, inputs: Sequence[Any]) -> list[Any]:
        return [{} for _ in inputs]

    def get_memory_usage(self) -> dict[str, Any]:
        return {"total_mb": 0.0}


@pytest.fixture(scope="module")
def impatient() -> Iterator[LiveServer]:
    with LiveServer(RunnerHost(EndlessRunner), **SOON) as server:
        yield server


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer(RunnerHost(EndlessRunner)) as server:
        yield server


def check_it_answers(server: LiveServer) -> None:
    with server.connection(LIVEZ) as one:
        assert read_until(one, b"\r\n\r\n").startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("sent", [b"", LIVEZ[:1], LIVEZ[:-2], LIVEZ + LIVEZ[:-2]])
def test_who_never_sends_a_whole_head_is_left(impatient: LiveServer, sent: bytes) -> None:
    with impatient.connection(sent) as one:
        answer = read_all(one)
    assert answer.count(b"HTTP/1.1 200") == sent.count(b"\r\n\r\n")
    wait_for(lambda: impatient.num_connections == 0)


def test_a_head_that_drips_is_not_waited_for(impatient: LiveServer) -> None:
    with impatient.connection() as one:
        one.settimeout(0.05)
        for byte in iter(lambda: b"x", None):
            try:
                one.sendall(byte)
                if one.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:  # closed while it was sent
                break


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"GET /livez?", HARMLESS),
        (b"GET /livez HTTP/1.1\r\nX: ", HARMLESS),
        (b"GET /livez HTTP/1.1\r\n" + HARMLESS, HARMLESS),
        (b"GET /livez HTTP/1.1\r\n", b"X: " + HARMLESS + b"\r\n"),
        (LIVEZ + b"GET /livez HTTP/1.1\r\n", b"X: " + HARMLESS + b"\r\n"),
        (CHUNKED + b"1;x=", HARMLESS),
        (CHUNKED + b"0\r\n", b"X: " + HARMLESS + b"\r\n"),
    ],
    ids=["url", "value", "name", "headers", "second", "extension", "trailers"],
)
def test_what_has_no_end_is_refused(server: LiveServer, start: bytes, more: bytes) -> None:
    num_sent = 0
    with server.connection(start) as one:
        try:
            while num_sent < 100 * MAX_HEAD_BYTES:
                one.sendall(more)
                num_sent += len(more)
        except OSError:
            pass
        else:
            raise AssertionError("it went on reading")
    wait_for(lambda: server.num_connections == 0)
    check_it_answers(server)


def test_a_head_that_is_too_large_is_told_so(server: LiveServer) -> None:
    with server.connection(b"GET /livez HTTP/1.1\r\n") as one:
        one.settimeout(0.01)
        answer = b""
        while not answer:  # slow enough to hear the answer before the connection is reset
            one.sendall(b"X: " + HARMLESS + b"\r\n")
            try:
                answer = one.recv(65536)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b"over 65536 bytes" in answer


def test_a_large_head_within_the_limit(server: LiveServer) -> None:
    headers = b"".join(b"X-%d: %s\r\n" % (number, HARMLESS) for number in range(12))
    with server.connection(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n", headers, b"\r\n") as one:
        assert read_until(one, b"\r\n\r\n").startswith(b"HTTP/1.1 200")


def narrow(server: LiveServer, data: bytes) -> socket.socket:
    """A connection whose client has little room for what it does not read."""
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    one.connect(("127.0.0.1", server.port))
    one.sendall(data)
    return one


@pytest.mark.parametrize("stream", [True, False])
def test_who_reads_nothing_is_cut_off(impatient: LiveServer, stream: bool) -> None:
    runner = impatient.host.runner
    assert isinstance(runner, EndlessRunner)
    runner.under_way.clear()
    data = request("/predict", model=None, stream=stream)
    with narrow(impatient, data), narrow(impatient, data):
        wait_for(lambda: impatient.num_connections == 2)
        check_it_answers(impatient)
        wait_for(lambda: impatient.num_connections == 0)
    assert len(runner.under_way) == 2
    wait_for(lambda: all(one.is_cancelled for one in runner.under_way))


def test_who_reads_slowly_is_not(impatient: LiveServer) -> None:
    """For longer than `stalled_s`, but with every look there is less to be read."""
    with impatient.connection(request("/predict", model=None)) as one:
        received, begun = 0, time.monotonic()
        while received < 30_000_000:
            part = one.recv(300_000)
            assert part, "it was cut off"
            received += len(part)
            time.sleep(0.01)
        assert time.monotonic() - begun > SOON["stalled_s"]
