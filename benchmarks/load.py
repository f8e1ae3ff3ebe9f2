"""The clients of the `no_op` benchmark, in a process of their own that does as little as it can.

    python -m benchmarks.load PORT PATH NUM_CLIENTS NUM_REQUESTS BODY

sends the same JSON over kept connections, the next request when the answer is whole, and prints
what it saw as JSON. An answer that is not a 200, or a connection that is dropped, ends it.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

TIMEOUT_S = 120.0
EVENT = b"data: "


@dataclass(frozen=True)
class Load:
    """What the clients saw.

    Attributes:
        num_events: server-sent events in all answers.
        client_share: what the clients used of one core.
    """

    num_requests: int
    num_events: int
    num_bytes: int
    elapsed_s: float
    client_share: float

    @property
    def requests_per_s(self) -> float:
        return self.num_requests / self.elapsed_s


def put_load(port: int, path: str, num_clients: int, num_requests: int, body: Any) -> Load:
    """Let a process of its own ask; `num_requests` in all."""
    command = [sys.executable, "-m", "benchmarks.load", str(port), path, str(num_clients)]
    command += [str(num_requests), json.dumps(body)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True
    )
    return Load(**json.loads(done.stdout.splitlines()[-1]))


class _Clients:
    """Requests that several connections share."""

    def __init__(self, request: bytes, num_requests: int) -> None:
        self.request = request
        self.num_left = num_requests
        self.num_events = 0
        self.num_bytes = 0
        self.num_busy = 0
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail(self, reason: str) -> None:
        if not self.over.done():
            self.over.set_exception(SystemExit(reason))


class _Connection(asyncio.Protocol):
    """One client: sends, looks for the end of the answer, and sends again."""

    def __init__(self, clients: _Clients) -> None:
        self._clients = clients
        self._received = bytearray()
        self._transport: Any = None
        self._has_ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._clients.num_busy += 1
        self._ask()

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._is_whole():
            self._take()
            self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._has_ended:
            self._clients.fail(f"a connection was dropped: {exc}")

    def _ask(self) -> None:
        clients = self._clients
        if clients.num_left == 0:
            self._has_ended = True
            self._transport.close()
            clients.num_busy -= 1
            if clients.num_busy == 0 and not clients.over.done():
                clients.over.set_result(None)
            return
        clients.num_left -= 1
        self._transport.write(clients.request)

    def _is_whole(self) -> bool:
        received = self._received
        end = received.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = bytes(received[:end]).lower()
        at = head.find(b"content-length:")
        if at < 0:  # in chunks
            return received.endswith(b"0\r\n\r\n")
        length = int(head[at + 15 :].partition(b"\r\n")[0])
        return len(received) >= end + 4 + length

    def _take(self) -> None:
        received, clients = self._received, self._clients
        if not received.startswith(b"HTTP/1.1 200 "):
            clients.fail(received[:500].decode(errors="replace"))
        clients.num_events += received.count(EVENT)
        clients.num_bytes += len(received)
        received.clear()


async def _run(port: int, path: str, num_clients: int, num_requests: int, body: str) -> Load:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: */*\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body.encode())}\r\n\r\n"
    )
    clients = _Clients(head.encode() + body.encode(), num_requests)
    loop = asyncio.get_running_loop()
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    for _ in range(num_clients):
        await loop.create_connection(lambda: _Connection(clients), "127.0.0.1", port)
    async with asyncio.timeout(TIMEOUT_S):
        await clients.over
    elapsed_s = time.perf_counter() - start_s
    cpu_s = time.process_time() - start_cpu_s
    return Load(num_requests, clients.num_events, clients.num_bytes, elapsed_s, cpu_s / elapsed_s)


if __name__ == "__main__":
    _port, _path, _num_clients, _num_requests, _body = sys.argv[1:]
    _load = uvloop.run(_run(int(_port), _path, int(_num_clients), int(_num_requests), _body))
    print(json.dumps(vars(_load)))
