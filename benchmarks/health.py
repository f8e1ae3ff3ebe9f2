"""How long `/health` takes to answer while eight generations run, on a real `bentoml serve`."""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from importlib.resources import files
from pathlib import Path

import httpx

from benchmarks.report import Figure
from benchmarks.servers import mlops_server

NUM_CLIENTS = 8
NUM_SAMPLES = 300


def run(runs: int) -> list[Figure]:
    """Serve the demo's base model and ask it from eight threads while probing `/health`."""
    model = str(files("mlops.demo") / "base_model")
    with (
        tempfile.TemporaryDirectory(prefix="mlops-bench-") as folder,
        mlops_server(Path(folder), model, max_batch_size=NUM_CLIENTS) as port,
    ):
        measured = [_probe_while_generating(f"http://127.0.0.1:{port}") for _ in range(runs)]
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
