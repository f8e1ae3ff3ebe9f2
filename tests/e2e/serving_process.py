"""A real `bentoml serve` (or any other server command) as a subprocess on a free port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import psutil

LONG_S = 120.0
BENTOML = (sys.executable, "-m", "bentoml")
MLOPS = (sys.executable, "-c", "from mlops.cli import main; main()")


def free_port() -> int:
    """A port that the operating system says is free."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class ServingProcess:
    """A server under test; leaving the context ends it and everything it started."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        home: Path,
        port: int | None = None,
        **environment: str,
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        home.mkdir(parents=True, exist_ok=True)
        self.output = home / f"output-{self.port}"
        self.errors = home / f"errors-{self.port}"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("MLOPS_")}
        with self.output.open("wb") as output, self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)],
                cwd=folder,
                env={
                    **inherited,
                    "BENTOML_HOME": str(home),
                    "BENTOML_DO_NOT_TRACK": "True",
                    **environment,
                },
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )
        self.seen: set[psutil.Process] = set()

    def __enter__(self) -> ServingProcess:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.workers():
            self.seen.add(process)
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(LONG_S)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(LONG_S)
        for process in self.left_over():
            process.kill()

    def workers(self) -> list[psutil.Process]:
        """The processes that answer requests, as long as the server runs."""
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
            found = [p for p in children if "_bentoml_impl.worker.service" in p.cmdline()]
        except psutil.NoSuchProcess:
            return []
        self.seen.update(children)
        return found

    def left_over(self) -> list[psutil.Process]:
        """What the server has started and not ended."""
        alive = []
        for process in self.seen:
            try:
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
            except psutil.NoSuchProcess:
                continue
        return alive

    def wait_until_ready(self) -> ServingProcess:
        """Poll `/readyz`."""
        give_up = time.monotonic() + LONG_S
        while True:
            try:
                if httpx.get(f"{self.url}/readyz", trust_env=False).status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            assert self.process.poll() is None, self.told()
            assert time.monotonic() < give_up, self.told()
            time.sleep(0.05)

    def wait_until_told(self, words: str) -> None:
        """Poll what the server prints."""
        give_up = time.monotonic() + LONG_S
        while words not in self.told():
            assert self.process.poll() is None, self.told()
            assert time.monotonic() < give_up, self.told()
            time.sleep(0.05)

    def wait(self) -> int:
        """Wait until the server has ended by itself; returns its exit status."""
        give_up = time.monotonic() + LONG_S
        while self.process.poll() is None:
            assert time.monotonic() < give_up, self.told()
            self.workers()
            time.sleep(0.05)
        return self.process.returncode

    def stop(self, with_signal: int = signal.SIGTERM) -> int:
        """Ask the server to end; returns its exit status."""
        self.workers()
        self.process.send_signal(with_signal)
        return self.process.wait(LONG_S)

    def told(self) -> str:
        """All that the server printed."""
        return f"{self.output.read_text()}\n--- stderr\n{self.errors.read_text()}"
