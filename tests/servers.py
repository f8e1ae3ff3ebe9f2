"""Real `bentoml serve` processes for the tests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

READY_WITHIN_S = 120


@dataclass
class Server:
    """One `bentoml serve`; `log` holds all that it printed."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def output(self) -> str:
        return self.log.read_text(errors="replace")


def free_port() -> int:
    """A port that the system chooses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(
    target: str,
    *arguments: str,
    cwd: Path,
    home: Path,
    ready: bool = True,
    bin_folder: Path | None = None,
    environment: dict[str, str] | None = None,
) -> Iterator[Server]:
    """Run `bentoml serve TARGET` in `cwd`, ready when the block begins, and gone when it ends."""
    port = free_port()
    log = cwd / f"serve-{port}.log"
    python = (bin_folder or Path(sys.executable).parent) / "python"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [python, "-m", "bentoml", "serve", target, "--port", str(port), *arguments],
            cwd=cwd,
            env={**os.environ, "BENTOML_HOME": str(home), **(environment or {})},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        if ready:
            wait_until_ready(server)
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_ready(server: Server) -> None:
    """Return when `/readyz` answers 200; fails with the server's output when it does not."""
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline and server.process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/readyz").status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"the server was not ready:\n{server.output()}")
