"""Many minutes under load: does the memory of the service grow?

    python -m benchmarks soak --minutes 10

32 clients ask the demo's model, served with its two kinds of request: whole answers and streams,
with lengths, schemas and temperatures at random. A third of the clients leave in the middle. The
worker's resident memory is read every few seconds; what is compared is the median of the last
tenth of the time with that of the third tenth. The worker's memory is limited, so that its prefix
cache, which is to grow up to its share, has done so by then. A client that stays and gets no whole
answer ends the benchmark.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.report import Figure
from benchmarks.servers import mlops_server

MINUTES = 10.0
NUM_CLIENTS = 32
MEMORY_MB = 512
SAMPLE_S = 2.0
LEAVING = 1 / 3
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string", "maxLength": 40}, "certain": {"type": "boolean"}},
    "required": ["answer", "certain"],
    "additionalProperties": False,
}


def run(runs: int, minutes: float = MINUTES) -> list[Figure]:
    """One long run, whatever `runs` says."""
    model = str(files("mlops.demo") / "base_model")
    with (
        tempfile.TemporaryDirectory(prefix="mlops-bench-") as folder,
        mlops_server(
            Path(folder), model, max_batch_size=NUM_CLIENTS, memory_per_worker_mb=MEMORY_MB
        ) as port,
    ):
        server = _listener(port)
        clients = _Clients(port, time.monotonic() + 60 * minutes)
        samples = asyncio.run(clients.run(server))
        engine = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).json()["engine"]
    tenth = max(1, len(samples) // 10)
    early = statistics.median(samples[2 * tenth : 3 * tenth])
    late = statistics.median(samples[-tenth:])
    return [
        Figure(
            f"{minutes:g} minutes, {NUM_CLIENTS} clients that come and go: growth of memory",
            "a fifth of the way",
            [late / early - 1],
            floor=0.02,
            aim=0,
            at_least=False,
            raw={
                "resident_mib": samples,
                "answered": [float(clients.num_answered)],
                "left": [float(clients.num_left)],
                "prefix_cache_mib": [engine["prefix_cache"]["bytes"] / 2**20],
            },
        )
    ]


def _listener(port: int) -> psutil.Process:
    """The worker process: the one with the most memory of those that listen on the port."""
    found = {
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.laddr and connection.laddr.port == port and connection.pid
    }
    processes = [psutil.Process(pid) for pid in found]
    processes += [child for process in processes for child in process.children(recursive=True)]
    return max(processes, key=lambda process: process.memory_info().rss)


class _Clients:
    def __init__(self, port: int, until_s: float) -> None:
        self._port = port
        self._until_s = until_s
        self._random = random.Random(0)  # noqa: S311 - the same load every time
        self.num_answered = 0
        self.num_left = 0

    async def run(self, server: psutil.Process) -> list[float]:
        """Resident MiB, every few seconds."""
        samples = []
        async with asyncio.TaskGroup() as tasks:
            for _ in range(NUM_CLIENTS):
                tasks.create_task(self._ask_until_the_end())
            while time.monotonic() < self._until_s:
                await asyncio.sleep(SAMPLE_S)
                samples.append(server.memory_info().rss / 2**20)
        return samples

    async def _ask_until_the_end(self) -> None:
        while time.monotonic() < self._until_s:
            leaves = self._random.random() < LEAVING
            body = self._make_body()
            head = (
                "POST /v1/completions HTTP/1.0\r\nHost: 127.0.0.1\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            try:
                writer.write(head.encode() + body)
                reading = asyncio.ensure_future(reader.read())
                if leaves:
                    await asyncio.wait([reading], timeout=self._random.uniform(0, 0.4))
                    reading.cancel()
                    self.num_left += 1
                else:
                    _check(await asyncio.wait_for(reading, 300))
                    self.num_answered += 1
            finally:
                writer.close()

    def _make_body(self) -> bytes:
        pick = self._random
        fields: dict[str, Any] = {
            "model": "base",
            "prompt": " ".join(pick.choices(["list", "set", "what", "is", "a", "tuple"], k=30)),
            "max_tokens": pick.randint(1, 96),
            "temperature": pick.choice([0, 1]),
            "stream": pick.random() < 0.5,
        }
        if pick.random() < 0.2:
            schema = {"name": "answer", "schema": SCHEMA}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return json.dumps(fields).encode()


def _check(answer: bytes) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head.partition(b"\r\n")[0]:
        raise SystemExit(answer[-500:].decode(errors="replace"))
    if b"text/event-stream" in head and b"data: [DONE]\n\n" not in body:
        raise SystemExit(f"a stream without its end: {body[-300:]!r}")
