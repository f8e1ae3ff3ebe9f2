"""uvicorn in a thread of the test, on a port that the system chooses, as a worker runs it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import uvicorn

from mlops.serving.bentoml.connections import watched
from mlops.serving.http import HTTPSettings, RunnerHost, Served, ServiceInfo, create_app

LONG_S = 60.0


class LiveServer:
    """A service over `host`; leaving the context stops both.

    Args:
        limits: for `mlops.serving.bentoml.connections.watched`.
    """

    def __init__(
        self,
        host: RunnerHost,
        info: ServiceInfo | None = None,
        settings: HTTPSettings | None = None,
        **limits: float,
    ) -> None:
        self.host = host
        app = create_app(Served(host, info or ServiceInfo("tiny"), settings or HTTPSettings()))
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.port: int = self.listener.getsockname()[1]

        @contextlib.asynccontextmanager
        async def lifespan(_: Any) -> AsyncIterator[None]:
            async with watched(self.server, host, **limits):
                yield

        app.router.lifespan_context = lifespan
        config = uvicorn.Config(
            app, log_config=None, server_header=False, timeout_graceful_shutdown=1
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True
        )

    def __enter__(self) -> LiveServer:
        self.host.start()
        self.thread.start()
        wait_for(lambda: self.server.started and self.host.status != "loading")
        assert self.host.failure is None
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(LONG_S)
        assert not self.thread.is_alive()
        self.listener.close()
        self.host.stop()

    @contextlib.contextmanager
    def connection(self, *data: bytes) -> Iterator[socket.socket]:
        """A connection on which `data` has been sent."""
        with socket.create_connection(("127.0.0.1", self.port), LONG_S) as one:
            for part in data:
                one.sendall(part)
            yield one

    @property
    def num_connections(self) -> int:
        return len(self.server.server_state.connections)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def wait_for(condition: Callable[[], Any]) -> None:
    give_up = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < give_up, "it never came"
        time.sleep(0.002)


def read_until(one: socket.socket, end: bytes) -> bytes:
    """What comes, up to `end` or to the end of the connection."""
    received = b""
    while end not in received:
        part = one.recv(65536)
        if not part:
            break
        received += part
    return received


def read_all(one: socket.socket) -> bytes:
    """What comes until the connection is closed; a reset is an end too."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := one.recv(65536):
            received += part
    return received
