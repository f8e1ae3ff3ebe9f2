"""What an operator gets from a real engine, and from several processes at once."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from mlops.serving.http import RunnerHost, Served, ServiceInfo, create_app
from mlops.serving.runner import MLXModelRunner
from tiny_models import write_language_model, write_lora_adapter

LONG_S = 60.0
OPENMETRICS = "application/openmetrics-text; version=1.0.0"

WORKER = """
import os, sys

from mlops.serving.http import RunnerHost, ServiceInfo
from mlops.serving.http.prometheus import Metrics
from mlops.serving.http.records import RequestRecord

metrics = Metrics(ServiceInfo("my_service"))
for milliseconds in (1.0, 3000.0):
    timings = {"queue_ms": milliseconds}
    metrics.on_request(RequestRecord("id", status=200, route="/predict", timings=timings))
metrics.refresh(RunnerHost(lambda: None))
metrics._running.set(3)
print("ready", flush=True)
sys.stdin.readline()
text, _ = metrics.render("application/openmetrics-text")
print(text.decode(), end="", flush=True)
"""

WITHOUT_ROOM = """
import os, resource, shutil, sys

from prometheus_client import Counter

early = Counter("early", "Made before the service's.", ["name"])
early.labels("a").inc()

from mlops.serving.http import RunnerHost, ServiceInfo
from mlops.serving.http.prometheus import Metrics

metrics = Metrics(ServiceInfo("my_service"))
late = Counter("late", "Made after them.", ["name"])
host = RunnerHost(lambda: None)


def render():
    metrics.refresh(host)
    print(metrics.render("application/openmetrics-text")[0].decode() + "END", flush=True)


soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
names = [f"{number} {'x' * 500}" for number in range(150)]
for name in names:
    early.labels(name).inc()
    late.labels(name).inc()
render()
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
for name in names:
    early.labels(name).inc()
    late.labels(name).inc()
render()
folder = os.environ["PROMETHEUS_MULTIPROC_DIR"]
holes = [one.name for one in os.scandir(folder) if one.stat().st_blocks * 512 < one.stat().st_size]
print(f"{holes}END", flush=True)
shutil.rmtree(folder)
render()
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunnerHost]:
    folder = tmp_path_factory.mktemp("models")
    base = write_language_model(folder / "base")
    formal = write_lora_adapter(folder / "formal", base, scale=40.0, base_reference=str(base))
    host = RunnerHost(lambda: MLXModelRunner(base, adapters={"formal": formal}))
    host.start()
    give_up = time.monotonic() + LONG_S
    while host.status == "loading":
        assert time.monotonic() < give_up
        time.sleep(0.01)
    assert host.failure is None
    yield host
    host.stop()


@pytest.fixture
def client(host: RunnerHost) -> TestClient:
    return TestClient(create_app(Served(host, ServiceInfo("tiny"))), raise_server_exceptions=False)


def values_in(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def at(text: str, name: str, **labels: str) -> float:
    return values_in(text)[name, frozenset(labels.items())]


def scrape(client: TestClient) -> str:
    return client.get("/metrics", headers={"accept": OPENMETRICS}).text


@pytest.mark.parametrize("stream", [False, True])
def test_a_generation_is_counted_once(client: TestClient, stream: bool) -> None:
    before, after = {}, {}
    asks = {"text": "Hello", "adapter": "formal", "max_tokens": 6, "ignore_eos": True}
    for values in (before, after):
        values.update(values_in(scrape(client)))
        if values is before:
            assert client.post("/predict", json={**asks, "stream": stream}).status_code == 200

    def growth(name: str, **labels: str) -> float:
        key = name, frozenset(labels.items())
        return after[key] - before.get(key, 0.0)

    labels = {"route": "/predict", "status": "200", "adapter": "formal"}
    assert growth("mlops_requests_total", **labels) == 1
    assert growth("mlops_generation_tokens_total", adapter="formal") == 6
    assert growth("mlops_prompt_tokens_total", adapter="formal") > 0
    assert growth("mlops_sequences_finished_total", finish_reason="length") == 1
    for name in (
        "mlops_request_queue_time_seconds",
        "mlops_time_to_first_token_seconds",
        "mlops_time_per_output_token_seconds",
    ):
        assert growth(f"{name}_count") == 1
    assert after["mlops_adapters_resident", frozenset()] == 1
    assert after["mlops_adapter_memory_bytes", frozenset()] > 0
    assert after["mlops_kv_cache_budget_bytes", frozenset()] > 0
    assert after["mlops_num_requests_running", frozenset()] == 0


def test_what_runs_and_waits_is_told_by_adapter(host: RunnerHost, client: TestClient) -> None:
    async def ask() -> str:
        assert host.text_runner is not None
        deadline_s = time.monotonic() + LONG_S
        fields = {"text": "Hello", "adapter": "formal", "max_tokens": 100, "ignore_eos": True}
        running = host.text_runner.generate(fields, deadline_s=deadline_s)
        try:
            await anext(running.chunks())
            return scrape(client)
        finally:
            running.cancel()

    text = asyncio.run(ask())
    assert at(text, "mlops_adapter_requests_running", adapter="formal") == 1
    assert at(text, "mlops_kv_cache_bytes") > 0
    assert 0 < at(text, "mlops_kv_cache_usage_perc") <= 1
    assert 'running_lora_adapters="formal",waiting_lora_adapters=""' in text


def start_worker(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER],
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_scrape_adds_up_the_workers_and_forgets_the_dead(tmp_path: Path) -> None:
    workers = [start_worker(tmp_path) for _ in range(3)]
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        first, second, killed = workers
        text, _ = first.communicate("\n", LONG_S)
        labels = {"route": "/predict", "status": "200", "adapter": ""}
        assert at(text, "mlops_requests_total", **labels) == 6
        assert at(text, "mlops_num_requests_running") == 9
        assert at(text, "mlops_request_queue_time_seconds_bucket", le="1.0") == 3
        assert at(text, "mlops_request_queue_time_seconds_count") == 6
        assert at(text, "mlops_request_queue_time_seconds_sum") == pytest.approx(9.003)
        killed.kill()
        killed.wait(LONG_S)
        text, _ = second.communicate("\n", LONG_S)
        assert at(text, "mlops_requests_total", **labels) == 6  # what was counted, was
        assert at(text, "mlops_num_requests_running") == 3
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def test_series_that_the_disk_has_no_room_for_come_back(tmp_path: Path) -> None:
    """A file that may not grow stands for a full disk; nothing is mapped that is not there."""
    folder = tmp_path / "metrics"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ROOM],
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    full, with_room, holes, folder_gone, _ = done.stdout.split("END\n")
    first, last = f"0 {'x' * 500}", f"149 {'x' * 500}"
    assert 'early_total{name="a"} 1.0' in full
    assert f'early_total{{name="{first}"}} 1.0' in full
    assert last not in full
    assert 100 < at(full, "mlops_metrics_unwritten") < 300
    for name in (first, last):  # what was counted meanwhile is there too
        for counter in ("early", "late"):
            assert f'{counter}_total{{name="{name}"}} 2.0' in with_room
    assert at(with_room, "mlops_metrics_unwritten") == 0
    assert holes == "[]"
    assert at(folder_gone, "mlops_model_loaded") == 0
    assert done.stderr.count("cannot hold all metrics") == 1


def test_the_gauges_are_fresh_while_the_app_runs(host: RunnerHost) -> None:
    """Without anybody asking this worker: another one may be the one that is scraped."""
    served = Served(host, ServiceInfo("tiny"))
    app: Any = create_app(served)
    with TestClient(app):
        assert served.metrics is not None
        give_up = time.monotonic() + LONG_S
        while "mlops_model_loaded 1.0" not in served.metrics.render("")[0].decode():
            assert time.monotonic() < give_up
            time.sleep(0.01)
