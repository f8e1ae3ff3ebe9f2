"""What takes a running service's metrics away, or would take the service with them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving_process import BENTOML, LONG_S, MLOPS, ServingProcess

SERVICE = """
from prometheus_client import Counter

from mlops.serving.bentoml.service import create_bentoml_service

ANSWERS = Counter("answers", "Of this service's author.", ["text"])


class EchoRunner:
    is_loaded = False

    def __init__(self, model_path):
        pass

    def load_model(self):
        self.is_loaded = True

    def unload_model(self):
        self.is_loaded = False

    def predict_batch(self, inputs):
        for fields in inputs:
            ANSWERS.labels(fields["text"]).inc()
        return [{"prediction": fields["text"]} for fields in inputs]

    def predict(self, fields):
        return self.predict_batch([fields])[0]

    def get_memory_usage(self):
        return {}


svc = create_bentoml_service("model", "echo", model_type="custom", runner_class=EchoRunner)
"""

WITHOUT_THE_COMMAND = """
import sys

import bentoml

bentoml.serve("service:svc", host="127.0.0.1", port=int(sys.argv[-1]), blocking=True)
"""


REQUESTS = ("mlops_requests_total", "", "/predict", "200")  # no adapter


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "service.py").write_text(SERVICE)
    (folder / "model").mkdir()
    return folder


@contextlib.contextmanager
def small_disk(folder: Path, size_mb: int) -> Iterator[Path]:
    """The folder as a file system of its own, where one can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(folder)]
    try:
        is_mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        is_mounted = False
    try:
        yield folder
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Take all the room there is, to the last byte."""
    filling = disk / "filling"
    with filling.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass
    with pytest.raises(OSError, match="No space"):
        (disk / "more").write_bytes(bytes(4096))
    return filling


def ask(server: ServingProcess, text: str) -> Any:
    response = httpx.post(
        f"{server.url}/predict", json={"text": text}, timeout=LONG_S, trust_env=False
    )
    assert response.status_code == 200, server.told()
    return response.json()["prediction"]


def metrics_of(server: ServingProcess) -> dict[tuple[str, ...], float]:
    """By name and labels' values, in the order of the labels' names."""
    response = httpx.get(f"{server.url}/metrics/prometheus", timeout=LONG_S, trust_env=False)
    assert response.status_code == 200, server.told()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def first(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServingProcess]:
    """A server that BentoML starts without our command; all that it writes is on a small disk."""
    program = (sys.executable, "-c", WITHOUT_THE_COMMAND)
    with (
        small_disk(tmp_path_factory.mktemp("small") / "home", size_mb=2) as home,
        ServingProcess(program, project, home, TMPDIR=str(home)) as server,
    ):
        yield server.wait_until_ready()
        server.stop()
        assert list((home / "mlops" / "metrics").iterdir()) == []


def test_a_server_that_fails_leaves_the_metrics_of_others(
    project: Path, first: ServingProcess
) -> None:
    ask(first, "first")
    before = counts(first)
    command = (*BENTOML, "serve", "service:svc")
    with ServingProcess(command, project, home_of(first), first.port) as late:
        assert late.wait() != 0
        assert "choose another with --port" in late.told()
    assert counts(first) == before


def test_a_full_disk_costs_metrics_and_no_request(first: ServingProcess) -> None:
    disk, workers = home_of(first), first.workers()
    if not disk.is_mount():
        pytest.skip("no small file system can be mounted here")
    before = metrics_of(first).get(REQUESTS, 0)
    filling = fill(disk)
    # The author's labels and the routes: pages of the files that nothing was written to yet.
    texts = [f"{number} {'x' * 1000}" for number in range(100)]
    assert [ask(first, text) for text in texts] == texts
    for path in ("/health", "/v1/models", "/docs", "/made/up", "/schema.json", "/livez"):
        assert httpx.get(f"{first.url}{path}", trust_env=False).status_code in {200, 404}
    found = metrics_of(first)
    assert found["mlops_metrics_unwritten",] > 10
    assert found[REQUESTS] == before + 100
    assert first.workers() == workers
    filling.unlink()
    for text in texts:
        ask(first, text)
    found = metrics_of(first)
    for text in texts:  # what was counted meanwhile is there again
        assert found["answers_total", text] == 2
    assert found["mlops_metrics_unwritten",] < 10
    assert first.workers() == workers


@pytest.mark.long
def test_two_servers_tell_of_their_own_requests(project: Path, first: ServingProcess) -> None:
    folders = home_of(first) / "mlops" / "metrics"
    left_over = folders / "1-of-a-killed-server"
    left_over.mkdir()
    (left_over / "counter_1.db").touch()
    os.utime(left_over, (0, 0))  # long ago
    ask(first, "first")
    before = counts(first)
    command = (*MLOPS, "serve", "service:svc", "--workers", "2")
    with ServingProcess(command, project, home_of(first)) as second:
        second.wait_until_ready()
        for _ in range(3):
            ask(second, "second")
        assert counts(second) == {"second": 3}
        assert counts(first) == before
        assert not left_over.exists()
        assert len(list(folders.iterdir())) == 2
    assert len(list(folders.iterdir())) == 1
    assert counts(first) == before


def home_of(server: ServingProcess) -> Path:
    return server.errors.parent


def counts(server: ServingProcess) -> dict[str, float]:
    """What the author's counter says, which has to be as many as ours."""
    found = metrics_of(server)
    answers = {key[1]: value for key, value in found.items() if key[0] == "answers_total"}
    assert sum(answers.values()) == found[REQUESTS]
    return answers
