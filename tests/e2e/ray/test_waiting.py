"""Deployments that wait say for what, and end when nothing is to be waited for."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from serving_process import MLOPS

from mlops.serving.ray import deploy, status, undeploy
from ray_cluster import LONG_S, RayCluster, post, wait_until


@contextmanager
def waiting_deployment(
    cluster: RayCluster, home: Path, project: str, told: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """`mlops deploy` of a replica that no node has room for."""
    command = [*MLOPS, "deploy", "waiting:2.0.0", "--ray-address", cluster.address]
    settings = {"MLOPS_PROJECT_NAME": project, "MLOPS_CPU_PER_WORKER": "50"}
    settings["MLOPS_PORT"] = str(cluster.port)
    with told.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--replicas", "1"],
            env={**os.environ, "BENTOML_HOME": str(home), **settings},
            stdout=output,
            stderr=output,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        )
    try:
        wait_until(lambda: "no node has room for a replica, which takes 50 CPU" in told.read_text())
        yield process
    finally:
        process.kill()
        process.wait()


def test_what_waits_says_for_what_and_by_what_it_was_overtaken(
    cluster: RayCluster, home: Path, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    with waiting_deployment(cluster, home, "tests", told) as overtaken:
        deployed = deploy("waiting:1.0.0", cluster.settings())
        assert overtaken.wait(LONG_S) == 1
    assert "was overtaken by a deployment of waiting:1.0.0 with 1 replica" in told.read_text()

    # While it is taken away it is shown, until its last request is answered.
    answers: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: answers.append(post(f"{deployed.url}/predict", {"input": 5}))
    )
    asking.start()
    time.sleep(1)  # until it is being answered
    ending = threading.Thread(target=undeploy, args=("tests-waiting",))
    ending.start()
    wait_until(lambda: [one.status for one in status()] == ["DELETING"])
    (shown,) = status()
    assert (shown.name, shown.replica_states) == ("tests-waiting", "1 stopping")
    ending.join()
    asking.join()
    assert [one.status_code for one in answers] == [200]
    assert status() == []


def test_ctrl_c_says_that_it_goes_on(cluster: RayCluster, home: Path, tmp_path: Path) -> None:
    told = tmp_path / "told"
    with waiting_deployment(cluster, home, "left", told) as left:
        left.send_signal(signal.SIGINT)
        assert left.wait(LONG_S) == 130
    assert "goes on" in told.read_text() and "`mlops undeploy left-waiting`" in told.read_text()
    assert "Traceback" not in told.read_text()
    began_s = time.monotonic()
    undeploy("left-waiting")  # nothing runs: Ray would wait for as long as a request may take
    assert time.monotonic() - began_s < 120
    assert status() == []
