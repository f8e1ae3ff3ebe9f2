"""A `bentoml serve` of the demo's own, and questions to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlops.errors import ServiceError

_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks without the user's proxy: the service is on this machine."""


@contextlib.contextmanager
def served(bento_tag: str, home: Path, log: Path, port: int | None = None) -> Iterator[str]:
    """Run `bentoml serve` until the block ends; gives the address once the model is loaded.

    Args:
        home: `BENTOML_HOME` of the process.
        log: file for what the server prints.
        port: by default one that the system chooses.

    Raises:
        ServiceError: the server ended, or was not ready within two minutes; quotes its last lines.
    """
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "bentoml", "serve", bento_tag, "--port", str(port)]
    environment = {**os.environ, "BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True"}
    with log.open("w") as output:
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, cwd=log.parent
        )
    try:
        _wait_until_ready(server, url, log)
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def ask(url: str, **body: Any) -> dict[str, Any]:
    """`POST /predict`; returns the answer.

    Raises:
        ServiceError: the service refused; carries what it said.
    """
    return _fetch(
        urllib.request.Request(  # noqa: S310 - the address is our own, on loopback
            f"{url}/predict",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
    )


def metrics(url: str) -> dict[str, Any]:
    """`GET /metrics`, as JSON.

    Raises:
        ServiceError: the service does not answer.
    """
    return _fetch(urllib.request.Request(f"{url}/metrics"))  # noqa: S310 - on loopback


def _fetch(request: urllib.request.Request) -> dict[str, Any]:
    try:
        with _DIRECTLY.open(request, timeout=120) as response:
            answer: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as exc:
        said = exc.read().decode(errors="replace")
        raise ServiceError(f"the service answered {exc.code}: {said}", "demo") from exc
    except OSError as exc:
        raise ServiceError(f"{request.full_url} does not answer: {exc}", "demo") from exc
    return answer


def free_port(preferred: int = 0) -> int:
    """`preferred` when nobody listens there, else a port that the system chooses."""
    for port in (preferred, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise ServiceError("no free port on 127.0.0.1", "serve")


def _wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        with (
            contextlib.suppress(OSError),
            _DIRECTLY.open(f"{url}/readyz", timeout=5),
        ):
            return
        time.sleep(0.1)
    last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise ServiceError(f"the service did not come up; the end of {log}:\n{last}", "serve")
