"""What uvicorn does not bound: heads without an end, clients that send or read nothing.

A worker's uvicorn makes its connections of `Connection`, and `watched` looks at all of them every
few seconds. The limits are those of common reverse proxies.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import heapq
import logging
import math
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mlops.hardware.open_files import raise_open_file_limit
from mlops.serving.http import RunnerHost
from mlops.serving.http.errors import head_too_large, too_many_connections
from mlops.serving.http.paths import LISTENS_ON

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 * 1024
"""Of a request's line and headers, besides what one read from the socket brings."""

HEAD_S = 30.0
"""Until a connection has sent the whole head of a request that it has begun, or of its first."""

STALLED_S = 60.0
"""Until a client that reads nothing of what is waiting for it is cut off."""

LAST_LOOK_S = 0.25
"""When the service ends, for what an idle connection has sent and nobody has read yet."""

SPARE_FILES = 128
"""Open files that connections leave to everything else: logs, adapters, metrics."""

CLOSED_TOGETHER = 64
"""Idle connections that end at once when there are too many: those that were silent longest."""

TOLD_EVERY_S = 60.0
"""How often the log says that there are too many."""

_LOOK_EVERY_S = 2.0


@contextlib.asynccontextmanager
async def watched(
    server: uvicorn.Server,
    host: RunnerHost,
    *,
    head_s: float = HEAD_S,
    stalled_s: float = STALLED_S,
    look_every_s: float = _LOOK_EVERY_S,
) -> AsyncIterator[None]:
    """Bound the server's connections in this block; entered before it accepts the first."""
    room = Room(server, raise_open_file_limit())
    if issubclass(
        server.config.http_protocol_class, HttpToolsProtocol
    ):  # else h11: it bounds heads
        making: Any = functools.partial(Connection, server, host, room)
        server.config.http_protocol_class = making
    looking = asyncio.create_task(_look(server, head_s, stalled_s, look_every_s))
    try:
        yield
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


class Room:
    """Makes room for connections when the process may open no more files.

    Otherwise whoever opens that many and says nothing makes the service deaf until their time is
    over.

    Args:
        max_open_files: that the process may have.
    """

    def __init__(self, server: uvicorn.Server, max_open_files: int) -> None:
        self._server = server
        self._max_connections = max_open_files - min(SPARE_FILES, max_open_files // 4)
        self._num_places = 0  # that idle connections have left, and new ones have not taken
        self._told_s = -math.inf

    def try_take(self, connection: Connection) -> bool:
        """Whether a new connection may stay; idle ones give way to it."""
        # Its number says how many are open: the system gives each file the lowest that is free.
        if connection.transport.get_extra_info("socket").fileno() < self._max_connections:
            self._num_places = 0
            return True
        if not self._num_places:
            self._tell()
            self._num_places = self._close_idle_ones(but=connection)
        is_there = self._num_places > 0
        self._num_places -= is_there
        return is_there

    def _close_idle_ones(self, but: Connection) -> int:
        now = time.monotonic()
        idle = [
            one
            for one in self._server.server_state.connections
            if isinstance(one, Connection) and one.is_idle and one is not but
        ]
        longest = heapq.nsmallest(CLOSED_TOGETHER, idle, key=lambda one: one.head_since_s or now)
        for one in longest:
            one.transport.close()
        return len(longest)

    def _tell(self) -> None:
        if (now := time.monotonic()) - self._told_s < TOLD_EVERY_S:
            return
        self._told_s = now
        logger.warning(
            "%d connections are too many: idle ones are closed to make room; the system's limit "
            "of open files decides (ulimit -n, LimitNOFILE)",
            len(self._server.server_state.connections),
        )


class Connection(HttpToolsProtocol):
    """uvicorn's connection with bounded heads, that ends politely.

    Attributes:
        head_since_s: of `time.monotonic()`; since when the head of a request is awaited. None
            while a request is answered, and between two, where uvicorn has a limit of its own.
    """

    def __init__(
        self, server: uvicorn.Server, host: RunnerHost, room: Room, **options: Any
    ) -> None:
        super().__init__(**options)
        self._server = server
        self._host = host
        self._room = room
        self._has_got_on = False
        self._num_idle_bytes = 0  # since the parser last had a head or a part of a body
        self._listens_on: tuple[str, ...] = ()
        self.head_since_s: float | None = time.monotonic()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._listens_on = _addresses(self._server)  # now: when the server ends it has none
        if self._server.should_exit:  # accepted too late for uvicorn to tell it
            self.shutdown()
        elif not self._room.try_take(self):
            self.transport.write(too_many_connections())
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.head_since_s = time.monotonic()
        scope: Any = self.scope
        scope[LISTENS_ON] = self._listens_on

    def on_headers_complete(self) -> None:
        self._has_got_on, self.head_since_s = True, None
        super().on_headers_complete()
        if self._host.is_draining and self.cycle is not None:
            self.cycle.keep_alive = False  # the answer says so: the client asks elsewhere next

    def on_body(self, body: bytes) -> None:
        self._has_got_on = True
        super().on_body(body)

    def data_received(self, data: bytes) -> None:
        self._has_got_on = False
        super().data_received(data)
        # The parser puts no end to a header, to their number, nor to what may surround chunks.
        self._num_idle_bytes = 0 if self._has_got_on else self._num_idle_bytes + len(data)
        if self._num_idle_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse_head()

    def shutdown(self) -> None:
        """Called by uvicorn when the service ends."""
        if self.is_idle:
            self.loop.call_later(LAST_LOOK_S, self._close_if_idle)
        else:
            super().shutdown()

    @property
    def is_idle(self) -> bool:
        is_answering = self.cycle is not None and not self.cycle.response_complete
        return not is_answering and not self.transport.is_closing()

    def _close_if_idle(self) -> None:
        if self.is_idle:
            self.transport.close()

    def _refuse_head(self) -> None:
        if self.is_idle:  # else there is, or will be, another answer
            self.transport.write(head_too_large(MAX_HEAD_BYTES))
        self.transport.close()


def _addresses(server: uvicorn.Server) -> tuple[str, ...]:
    """What the server listens on; () for sockets without an address."""
    names = [one.getsockname() for open_ in server.servers for one in open_.sockets]
    return tuple(name[0] for name in names if isinstance(name, tuple))


async def _look(
    server: uvicorn.Server, head_s: float, stalled_s: float, look_every_s: float
) -> None:
    unread: dict[Any, tuple[int, float]] = {}  # by connection: bytes, and since when so many
    while True:
        await asyncio.sleep(look_every_s)
        now, before, unread = time.monotonic(), unread, {}
        for connection in list(server.server_state.connections):
            transport = connection.transport
            head_since_s = getattr(connection, "head_since_s", None)
            if head_since_s is not None and now - head_since_s > head_s:
                transport.close()
            # Also of a connection that is closing: it waits for ever for its client to read.
            if num_bytes := transport.get_write_buffer_size():
                known = before.get(connection)
                since = known[1] if known and known[0] == num_bytes else now
                unread[connection] = (num_bytes, since)
                if now - since > stalled_s:
                    logger.warning("a client reads nothing; its connection is cut off")
                    transport.abort()
