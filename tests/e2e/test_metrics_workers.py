"""A scrape of `bentoml serve --workers 2` reaches one worker and tells of both."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from serving_process import BENTOML, LONG_S, ServingProcess

SERVICE = """
import os

from mlops.serving.bentoml.service import create_bentoml_service


class WhoRunner:
    def __init__(self, model_path):
        self.is_loaded = False

    def load_model(self):
        self.is_loaded = True

    def predict(self, input_data):
        return {"prediction": os.getpid(), "mlx_optimized": False, "model_type": "custom"}

    def predict_batch(self, inputs):
        return [self.predict(fields) for fields in inputs]

    def get_memory_usage(self):
        return {"total_mb": 1.0, "mlx_available": False}

    def unload_model(self):
        self.is_loaded = False


svc = create_bentoml_service(
    "model", "my_service", "my_project", model_type="custom", runner_class=WhoRunner,
    config={"http": {"log_format": "json"}},
)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServingProcess]:
    folder = tmp_path_factory.mktemp("project")
    (folder / "service.py").write_text(SERVICE)
    (folder / "model").mkdir()
    command = [*BENTOML, "serve", "service:svc", "--workers", "2"]
    with ServingProcess(command, folder, folder / "home") as server:
        yield server.wait_until_ready()


def get(server: ServingProcess, path: str, **headers: str) -> httpx.Response:
    return httpx.get(f"{server.url}{path}", headers=headers, timeout=LONG_S, trust_env=False)


def value(server: ServingProcess, name: str, **labels: str) -> float:
    text = get(server, "/metrics", accept="application/openmetrics-text; version=1.0.0").text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def test_both_workers_are_told_of(server: ServingProcess) -> None:
    who: set[int] = set()
    answered = 0
    give_up = time.monotonic() + LONG_S
    while len(who) < 2:
        assert time.monotonic() < give_up
        # A connection of its own each time, or one worker would answer them all.
        response = httpx.post(f"{server.url}/predict", json={"text": "a"}, trust_env=False)
        who.add(response.json()["prediction"])
        answered += 1
    for _ in range(10):  # whichever worker is asked
        labels = {"route": "/predict", "status": "200"}
        assert value(server, "mlops_requests_total", **labels) == answered
        latency = "mlops_e2e_request_latency_seconds_count"
        assert value(server, latency, route="/predict") == answered
    while value(server, "mlops_model_loaded") < 2:
        assert time.monotonic() < give_up
    assert value(server, "process_resident_memory_bytes") > 0


def test_pages_of_bentoml_are_counted_by_their_route(server: ServingProcess) -> None:
    before = value(server, "mlops_requests_total", route="/schema.json")
    assert get(server, "/schema.json").status_code == 200
    assert value(server, "mlops_requests_total", route="/schema.json") == before + 1


def test_each_request_is_one_line_of_json(server: ServingProcess) -> None:
    response = get(server, "/made/up")
    request_id = response.headers["x-request-id"]
    give_up = time.monotonic() + LONG_S
    log = Path(server.errors.parent, "mlops", "logs", "my_service.log")
    for file in (server.output, log):
        while request_id not in file.read_text():
            assert time.monotonic() < give_up, server.told()
            time.sleep(0.02)
        lines = [line for line in file.read_text().splitlines() if request_id in line]
        told = [json.loads(line) for line in lines]
        assert [(one["status"], one["path"]) for one in told] == [(404, "/made/up")]
