"""How long `/health` takes to answer while eight generations run, on a real `bentoml serve`."""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import httpx

from benchmarks.report import Figure

NUM_CLIENTS = 8
NUM_SAMPLES = 300


def run(runs: int) -> list[Figure]:
    """Serve the demo's base model and ask it from eight threads while probing `/health`."""
    with tempfile.TemporaryDirectory(prefix="mlops-bench-") as folder, _served(Path(folder)) as url:
        measured = [_probe_while_generating(url) for _ in range(runs)]
    return [
        Figure(
            "/health p99 while 8 generations run",
            "(ms)",
            [latencies[int(0.99 * len(latencies))] for latencies in measured],
            floor=50,
            at_least=False,
            raw={"p50_ms": [statistics.median(latencies) for latencies in measured]},
        )
    ]


def _probe_while_generating(url: str) -> list[float]:
    stop = threading.Event()
    answered = []

    def generate() -> None:
        with httpx.Client(timeout=120) as client:
            while not stop.is_set():
                body = {"text": "Explain the for statement.", "max_tokens": 128, "temperature": 1}
                answered.append(client.post(f"{url}/predict", json=body).raise_for_status())

    clients = [threading.Thread(target=generate) for _ in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    latencies = []
    with httpx.Client(timeout=10) as probe:
        while len(latencies) < NUM_SAMPLES or not answered:
            start = time.perf_counter()
            probe.get(f"{url}/health").raise_for_status()
            latencies.append(1000 * (time.perf_counter() - start))
            time.sleep(0.01)
    stop.set()
    for client in clients:
        client.join()
    return sorted(latencies)


@contextlib.contextmanager
def _served(folder: Path) -> Iterator[str]:
    model = str(files("mlops.demo") / "base_model")
    (folder / "service.py").write_text(
        "from mlops.serving.bentoml.service import create_bentoml_service\n"
        f"svc = create_bentoml_service({model!r}, 'bench', config={{'max_batch_size': 8}})\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "BENTOML_HOME": str(folder / "home"), "BENTOML_DO_NOT_TRACK": "1"}
    command = [sys.executable, "-m", "bentoml", "serve", "service:svc", "--port", str(port)]
    server = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while not _is_ready(url):
            if time.monotonic() > deadline or server.poll() is not None:
                raise SystemExit("health: the service did not come up")
            time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait(30)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False
