"""A worker whose engine is dead or hangs says so, ends, and is replaced; nobody waits for a 504."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from serving_process import BENTOML, LONG_S, ServingProcess

import tiny_models
from live_server import wait_for

SERVICE = """
import os
import signal
import sys
import time

from mlops.engine import submit_to_owner
from mlops.serving.bentoml.service import create_bentoml_service
from mlops.serving.runner import MLXModelRunner


def end_thread(_):
    sys.exit("planted")


PLANTED = {
    "die": lambda: submit_to_owner(time.sleep, 0.2).add_done_callback(end_thread),
    "hang": lambda: submit_to_owner(time.sleep, 3600),
    "crash": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


class Planted(MLXModelRunner):
    def generate(self, input_data, **options):
        if plant := PLANTED.get(input_data.get("text")):
            plant()
        return super().generate(input_data, **options)


svc = create_bentoml_service("model", "planted", runner_class=Planted)
"""
TIMEOUT_S = 100.0
"""Of a request; whoever is answered much earlier has not waited for its 504."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServingProcess]:
    folder = tmp_path_factory.mktemp("planted")
    (folder / "service.py").write_text(SERVICE)
    tiny_models.write_language_model(folder / "model")
    settings = {"MLOPS_TIMEOUT": f"{TIMEOUT_S:g}", "MLOPS_STUCK_AFTER_S": "1"}
    command = [*BENTOML, "serve", "service:svc"]
    with ServingProcess(command, folder, folder / "home", **settings) as server:
        yield server


def ask(server: ServingProcess, text: str, **fields: Any) -> httpx.Response:
    body = {"text": text, "max_tokens": 3, **fields}
    return httpx.post(f"{server.url}/predict", json=body, timeout=LONG_S, trust_env=False)


def worker_of(server: ServingProcess) -> int:
    server.wait_until_ready()
    (worker,) = server.workers()
    return worker.pid


def wait_for_another(server: ServingProcess, before: int) -> None:
    wait_for(lambda: [one.pid for one in server.workers()] not in ([], [before]))
    server.wait_until_ready()
    assert ask(server, "Hi").status_code == 200


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("die", "has died of SystemExit: planted: only a restart helps"),
        pytest.param("hang", "has made no step for", marks=pytest.mark.long),
    ],
)
def test_requests_get_503_and_the_worker_is_replaced(
    server: ServingProcess, fault: str, reason: str
) -> None:
    before = worker_of(server)
    long = {
        "model": "planted",
        "prompt": "Hi",
        "max_tokens": 1000,
        "ignore_eos": True,
        "stream": True,
    }
    with (
        httpx.Client(base_url=server.url, trust_env=False, timeout=LONG_S) as client,
        client.stream("POST", "/v1/completions", json=long) as stream,
    ):
        lines = stream.iter_lines()
        assert next(lines).startswith("data: {")
        began_s = time.monotonic()
        planted = ask(server, fault)
        assert planted.status_code == 503, planted.text
        assert "started again" in planted.json()["error"]["message"]
        assert "started again" in [line for line in lines if line][-1]  # no [DONE]
    assert time.monotonic() - began_s < TIMEOUT_S / 2
    wait_for_another(server, before)
    told = server.told()
    assert told.count(reason) == 1
    assert f"worker {before} ended with status 1" in told


@pytest.mark.long
def test_a_worker_that_is_killed_is_named_with_its_signal(server: ServingProcess) -> None:
    before = worker_of(server)
    with pytest.raises(httpx.TransportError):
        ask(server, "crash")
    wait_for_another(server, before)
    assert f"worker {before} was killed by SIGKILL (out of memory?)" in server.told()


@pytest.mark.long
def test_sigterm_ends_a_worker_whose_engine_hangs(server: ServingProcess) -> None:
    """It has no requests, so nothing says that it hangs."""
    worker_of(server)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/predict", json={"text": "hang"}, timeout=0.3, trust_env=False)
    began_s = time.monotonic()
    assert server.stop(signal.SIGTERM) == 0
    assert time.monotonic() - began_s < 30
    assert server.left_over() == []


ARBITER = """
import sys
from bentoml._internal.utils.circus import create_standalone_arbiter
from circus.watcher import Watcher
from mlops.serving.bentoml.shutdown import signals_watched

sleeping = f"{sys.executable} -c 'import time; time.sleep(600)'"
arbiter = create_standalone_arbiter([Watcher("service", sleeping, numprocesses=2)])
with signals_watched(lambda *death, **more: False):
    arbiter.start()
"""


@pytest.mark.parametrize("delay_ms", [0, 1, 2, 8])
def test_sigterm_is_not_lost_while_dead_workers_are_replaced(delay_ms: int) -> None:
    command = subprocess.Popen([sys.executable, "-c", ARBITER])
    try:
        here = psutil.Process(command.pid)
        wait_for(lambda: len(here.children()) == 2)
        for worker in here.children():
            worker.kill()
        time.sleep(delay_ms / 1000)  # the moment of the attack
        command.terminate()
        assert command.wait(LONG_S) == 0
    finally:
        command.kill()
        command.wait()
