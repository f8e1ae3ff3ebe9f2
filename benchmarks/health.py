"""How long `/health` takes to answer while 32 streams run, on a real `bentoml serve`."""

from __future__ import annotations

import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

import httpx

from benchmarks.load import put_load
from benchmarks.report import Figure
from benchmarks.servers import mlops_server

NUM_CLIENTS = 32
NUM_STREAMS = 4 * NUM_CLIENTS
LEAST_SAMPLES = 100


def run(runs: int) -> list[Figure]:
    """Serve the demo's base model and read streams of it while probing `/health`."""
    model = str(files("mlops.demo") / "base_model")
    with (
        tempfile.TemporaryDirectory(prefix="mlops-bench-") as folder,
        mlops_server(Path(folder), model, max_batch_size=NUM_CLIENTS) as port,
    ):
        measured = [_probe_while_generating(port) for _ in range(runs)]
    return [
        Figure(
            "/health p99 while 32 streams run",
            "(ms)",
            [latencies[int(0.99 * len(latencies))] for latencies in measured],
            floor=50,
            aim=10,
            at_least=False,
            raw={"p50_ms": [statistics.median(latencies) for latencies in measured]},
        )
    ]


def _probe_while_generating(port: int) -> list[float]:
    """Latencies in ms, sorted. The streams are read by a process of their own."""
    body = {"text": "Explain the for statement.", "max_tokens": 128, "temperature": 1}
    with ThreadPoolExecutor(1) as pool, httpx.Client(timeout=10) as probe:
        streams = pool.submit(
            put_load, port, "/predict", NUM_CLIENTS, NUM_STREAMS, {**body, "stream": True}
        )
        latencies = []
        while not streams.done():
            start_s = time.perf_counter()
            health = probe.get(f"http://127.0.0.1:{port}/health").raise_for_status()
            elapsed_ms = 1000 * (time.perf_counter() - start_s)
            running = probe.get(f"http://127.0.0.1:{port}/metrics").json()["requests_running"]
            if health.json()["status"] == "healthy" and running >= NUM_CLIENTS - 2:
                latencies.append(elapsed_ms)
            time.sleep(0.01)
        streams.result()
    if len(latencies) < LEAST_SAMPLES:
        raise SystemExit(f"only {len(latencies)} samples while {NUM_CLIENTS} streams ran")
    return sorted(latencies)
