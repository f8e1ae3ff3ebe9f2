"""How `bentoml serve` ends: what runs finishes or is told, and nothing is lost."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from serving_process import BENTOML, LONG_S, MLOPS, ServingProcess

from gated_service import GATE_VARIABLE, request, write_gated_service

HOUR = "3600"
NUM_OF_EACH = 3


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return write_gated_service(tmp_path)


def serve(gate: Path, workers: int = 1, **options: str) -> ServingProcess:
    command = [*BENTOML, "serve", "service:svc", "--workers", str(workers)]
    # BentoML's own limit for a request does not cut off what our routes answer.
    overrides = {"services": {"gated": {"traffic": {"timeout": 1}}}}
    settings = {f"MLOPS_HTTP__{name.upper()}": value for name, value in options.items()}
    folder = gate.parent
    environment = {
        GATE_VARIABLE: str(gate),
        "BENTOML_CONFIG_OVERRIDES": json.dumps(overrides),
        **settings,
    }
    return ServingProcess(command, folder, folder / "home", **environment)


class Client:
    """One connection with one request under way."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.so_far = b""

    @classmethod
    async def ask(cls, server: ServingProcess, *, stream: bool = True) -> Client:
        """A stream is returned when its first text is there."""
        client = cls(*await asyncio.open_connection("127.0.0.1", server.port))
        client.writer.write(request(stream=stream))
        if stream:
            client.so_far = await client.reader.readuntil(b'" 0"')
        return client

    async def answer(self) -> bytes:
        """All that comes until the service closes the connection."""
        try:
            return self.so_far + await asyncio.wait_for(self.reader.read(), LONG_S)
        finally:
            self.writer.close()


async def ask_some(server: ServingProcess) -> tuple[list[Client], list[Client]]:
    """Streams, and requests for whole answers that the service has begun to answer."""
    whole = [await Client.ask(server, stream=False) for _ in range(NUM_OF_EACH)]
    streams = [await Client.ask(server) for _ in range(NUM_OF_EACH)]
    return streams, whole


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    give_up = time.monotonic() + LONG_S
    while not await condition():
        assert time.monotonic() < give_up, "it never came"
        await asyncio.sleep(0.02)


async def readiness(server: ServingProcess) -> int | None:
    """The status of `/readyz`; None when nobody listens."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    except ConnectionRefusedError:
        return None
    try:
        writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        head = await asyncio.wait_for(reader.read(64), LONG_S)
        return int(head.split()[1]) if head else None
    except ConnectionResetError:  # it was just about to end
        return None
    finally:
        writer.close()


def send_signal(server: ServingProcess, to: str, number: int = signal.SIGTERM) -> None:
    server.workers()
    if to == "group":
        os.killpg(server.process.pid, number)
    else:
        server.process.send_signal(number)


def check_whole(answers: list[bytes], *, stream: bool) -> None:
    for answer in answers:
        assert answer.startswith(b"HTTP/1.1 200"), answer
        assert b'" end"' in answer
        if stream:
            assert b"data: [DONE]\n\n" in answer
            assert answer.endswith(b"\r\n0\r\n\r\n")


def check_told(streams: list[bytes], whole: list[bytes]) -> None:
    for answer in streams:
        assert b"[DONE]" not in answer
        last = answer.rpartition(b"data: ")[2].partition(b"\n\n")[0]
        assert "shutting down" in json.loads(last)["error"]["message"]
        assert answer.endswith(b"\r\n0\r\n\r\n")
    for answer in whole:
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503")
        assert "shutting down" in json.loads(body)["error"]["message"]


def check_ended(server: ServingProcess) -> None:
    assert server.wait() == 0, server.told()
    assert server.left_over() == []
    assert "Traceback" not in server.told()


@pytest.mark.parametrize(("workers", "to"), [(1, "command"), (2, "group")])
def test_everything_accepted_is_answered(gate: Path, workers: int, to: str) -> None:
    async def run(server: ServingProcess) -> None:
        streams, whole = await ask_some(server)
        idle = await asyncio.open_connection("127.0.0.1", server.port)
        used = await asyncio.open_connection("127.0.0.1", server.port)
        used[1].write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await used[0].readuntil(b"\r\n\r\n\n")
        send_signal(server, to)

        async def is_not_ready() -> bool:
            return await readiness(server) == 503

        await until(is_not_ready)
        streams.append(await Client.ask(server))  # still taken, for the delay

        async def nobody_listens() -> bool:
            return await readiness(server) is None

        await until(nobody_listens)
        for reader, writer in (idle, used):
            assert await asyncio.wait_for(reader.read(), LONG_S) == b""
            writer.close()
        assert server.process.poll() is None
        gate.touch()
        check_whole([await client.answer() for client in streams], stream=True)
        check_whole([await client.answer() for client in whole], stream=False)

    options = {"shutdown_delay": "3", "shutdown_timeout": HOUR}
    with serve(gate, workers, **options) as server:
        asyncio.run(run(server.wait_until_ready()))
        check_ended(server)


def test_what_takes_too_long_is_told_so(gate: Path) -> None:
    async def run(server: ServingProcess) -> None:
        streams, whole = await ask_some(server)
        nobody_reads = await Client.ask(server)
        send_signal(server, "command")
        check_told(
            [await client.answer() for client in streams],
            [await client.answer() for client in whole],
        )
        nobody_reads.writer.transport.abort()

    with serve(gate, shutdown_timeout="0.5") as server:
        asyncio.run(run(server.wait_until_ready()))
        check_ended(server)


@pytest.mark.parametrize(
    ("signals", "workers", "to"),
    [
        ([signal.SIGTERM, signal.SIGTERM], 1, "command"),
        ([signal.SIGTERM, signal.SIGINT], 2, "group"),
        ([signal.SIGINT], 1, "command"),
        ([signal.SIGINT], 2, "group"),  # what Ctrl-C does
    ],
)
def test_whoever_insists_does_not_wait(
    gate: Path, signals: list[int], workers: int, to: str
) -> None:
    async def run(server: ServingProcess) -> None:
        streams, whole = await ask_some(server)
        send_signal(server, to, signals[0])
        for number in signals[1:]:

            async def nobody_listens() -> bool:
                return await readiness(server) is None

            await until(nobody_listens)
            assert server.process.poll() is None
            send_signal(server, to, number)
        check_told(
            [await client.answer() for client in streams],
            [await client.answer() for client in whole],
        )

    with serve(gate, workers, shutdown_timeout=HOUR) as server:
        asyncio.run(run(server.wait_until_ready()))
        check_ended(server)


def test_a_worker_alone_ends_and_another_takes_its_place(gate: Path) -> None:
    async def run(server: ServingProcess) -> None:
        streams, whole = await ask_some(server)
        first, other = server.workers()
        first.terminate()
        gate.touch()
        check_whole([await client.answer() for client in whole], stream=False)
        check_whole([await client.answer() for client in streams], stream=True)

        async def is_replaced() -> bool:
            now = server.workers()
            return len(now) == 2 and first not in now and other in now

        async def is_ready() -> bool:
            return await readiness(server) == 200

        await until(is_replaced)
        await until(is_ready)

    with serve(gate, workers=2, shutdown_timeout=HOUR) as server:
        asyncio.run(run(server.wait_until_ready()))
        assert server.stop() == 0


def test_what_waits_for_a_row_is_answered_too(tmp_path: Path) -> None:
    from tiny_models import write_language_model

    model = write_language_model(tmp_path / "tiny")
    num_tokens = 100

    async def run(server: ServingProcess) -> None:
        clients = [
            Client(*await asyncio.open_connection("127.0.0.1", server.port)) for _ in range(8)
        ]
        for client in clients:
            client.writer.write(
                request(
                    "/predict",
                    model=None,
                    prompt="count",
                    max_tokens=num_tokens,
                    ignore_eos=True,
                    stream=True,
                )
            )
        await clients[0].reader.readuntil(b"data: ")
        send_signal(server, "command")
        for client in clients:
            answer = await client.answer()
            assert b"data: [DONE]\n\n" in answer, answer[-500:]
            assert f'"completion_tokens": {num_tokens}'.encode() in answer

    environment = {"MLOPS_MAX_BATCH_SIZE": "1", "MLOPS_HTTP__SHUTDOWN_TIMEOUT": HOUR}
    command = [*MLOPS, "serve", str(model)]
    with ServingProcess(command, tmp_path, tmp_path / "home", **environment) as server:
        asyncio.run(run(server.wait_until_ready()))
        check_ended(server)
