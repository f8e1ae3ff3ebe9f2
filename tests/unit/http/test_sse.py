from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from mlops.serving.http.sse import GRACE_S, EventStream

LONG_S = 30.0


class Connection:
    """An ASGI server's end of one request whose client leaves, or reads, when it is told to."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.has_left = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()
        self.num_releases = 0
        self.closed_events = asyncio.Event()

    async def receive(self) -> Any:
        await self.has_left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await self.reads.wait()
        self.sent.append(message)

    def release(self) -> None:
        self.num_releases += 1

    async def events(self, *, endless: bool = False) -> AsyncGenerator[bytes, None]:
        try:
            yield b"data: 1\n\n"
            while endless:
                await asyncio.sleep(0)
                yield b"data: 2\n\n"
        finally:
            self.closed_events.set()

    async def answer(self, events: AsyncGenerator[bytes, None], time_s: float = LONG_S) -> None:
        stream = EventStream(events, release=self.release, deadline_s=time.monotonic() + time_s)
        await stream({"type": "http"}, self.receive, self.send)

    @property
    def is_complete(self) -> bool:
        return bool(self.sent) and self.sent[-1].get("more_body") is False


def test_events_are_sent_as_they_come() -> None:
    async def run() -> Connection:
        connection = Connection()
        await connection.answer(connection.events())
        return connection

    connection = asyncio.run(run())
    start, *bodies = connection.sent
    headers = dict(start["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"cache-control"] == b"no-cache"
    assert b"content-length" not in headers
    assert [body["body"] for body in bodies] == [b"data: 1\n\n", b""]
    assert connection.is_complete
    assert connection.num_releases == 1


@pytest.mark.parametrize("reads", [True, False])
def test_a_client_that_leaves_releases_it(reads: bool) -> None:
    async def run() -> Connection:
        connection = Connection()
        if not reads:
            connection.reads.clear()
        answering = asyncio.create_task(connection.answer(connection.events(endless=True)))
        await asyncio.sleep(0)
        connection.has_left.set()
        await asyncio.wait_for(answering, LONG_S)
        return connection

    connection = asyncio.run(run())
    assert not connection.is_complete
    assert connection.num_releases == 1
    assert connection.closed_events.is_set() or not connection.sent


def test_a_client_that_does_not_read_has_its_time_and_a_grace() -> None:
    async def run() -> Connection:
        connection = Connection()
        connection.reads.clear()
        await asyncio.wait_for(connection.answer(connection.events(), -GRACE_S + 0.05), LONG_S)
        return connection

    connection = asyncio.run(run())
    assert connection.sent == []
    assert connection.num_releases == 1


def test_a_fault_releases_it_and_is_told_to_the_server() -> None:
    async def fails() -> AsyncGenerator[bytes, None]:
        yield b"data: 1\n\n"
        raise RuntimeError("a mistake of ours")

    async def run() -> Connection:
        connection = Connection()
        with pytest.raises(RuntimeError, match="of ours"):
            await connection.answer(fails())
        return connection

    connection = asyncio.run(run())
    assert not connection.is_complete
    assert connection.num_releases == 1
