"""What dies on a cluster is replaced, and nobody waits for ever."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlops.serving.ray import status
from ray_cluster import (
    RayCluster,
    answers,
    environment,
    post,
    processes,
    replicas_of,
    wait_until,
)
from ray_load import Load, deployed


@pytest.fixture(scope="module")
def waiting(started_cluster: RayCluster, home: Path) -> Iterator[str]:
    """One replica that answers two at a time, each within 5 s; gives its URL."""
    settings = {
        **started_cluster.settings(),
        **{"stuck_after_s": 1, "max_batch_size": 2, "timeout": 5},
    }
    with environment(BENTOML_HOME=str(home)), deployed("waiting:1.0.0", settings) as url:
        yield url


def test_what_waits_is_bounded(cluster: RayCluster, waiting: str) -> None:
    with Load(f"{waiting}/predict", {"input": 0.5}, num_clients=32) as load:
        wait_until(lambda: load.statuses[429] and load.statuses[200])
    refused = next(one for _, one in load.answers if one.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert set(load.statuses) == {200, 429}


def test_replicas_proxies_and_the_controller_are_replaced(
    cluster: RayCluster, waiting: str
) -> None:
    with Load(f"{waiting}/predict", {"input": 0.1}, num_clients=8) as load:
        # A replica: those that it answered fail, those that wait do not.
        (replica,) = replicas_of("tests-waiting")
        os.kill(replica["pid"], signal.SIGKILL)
        killed_s = time.monotonic()
        wait_until(lambda: load.seen(killed_s))
        assert set(load.statuses) <= {0, 200, 500}  # 0: cut off in the middle of its answer
        failed = load.statuses[0] + load.statuses[500]
        assert 0 < failed <= 4  # what a replica is sent at once

        # The controller: nobody notices.
        for controller in processes("ray::ServeController"):  # forks of it among them
            controller.kill()
        since_s = time.monotonic()
        wait_until(lambda: processes("ray::ServeController"))
        wait_until(lambda: load.seen(since_s + 1))
        wait_until(lambda: [one.status for one in status()] == ["RUNNING"])
        assert load.statuses[0] + load.statuses[500] == failed
        assert set(load.statuses) <= {0, 200, 500}

    # The proxies: connections break, and are taken again.
    for proxy in processes("ray::ProxyActor"):
        proxy.kill()
    wait_until(lambda: answers(waiting))


def test_an_engine_that_stands_still_is_replaced(cluster: RayCluster, waiting: str) -> None:
    (before,) = replicas_of("tests-waiting")
    assert post(f"{waiting}/predict", {"input": "hang"}).status_code == 504
    is_new: Callable[[], bool] = lambda: any(  # noqa: E731
        one["pid"] != before["pid"] for one in replicas_of("tests-waiting")
    )
    wait_until(is_new)
    wait_until(lambda: answers(waiting))


def test_a_node_that_dies_takes_its_own_requests_only(cluster: RayCluster) -> None:
    one_each = {
        "project_name": "nodes",
        "cpu_per_worker": 0.6,
        "ray_min_replicas": 2,
        "ray_max_replicas": 2,
    }
    with deployed("waiting:1.0.0", {**cluster.settings(on=None), **one_each}) as url:
        nodes = {one["node_id"] for one in replicas_of("nodes-waiting")}
        assert len(nodes) == 2
        with Load(f"{url}/predict", {"input": 0.05}) as load:
            cluster.cluster.remove_node(cluster.worker, allow_graceful=False)
            killed_s = time.monotonic()
            try:
                wait_until(lambda: load.seen(killed_s + 3))
                wait_until(lambda: len(replicas_of("nodes-waiting")) == 1)
            finally:
                cluster.worker = cluster.add_node(resources={"worker": 10})
            wait_until(lambda: len(replicas_of("nodes-waiting")) == 2)
        assert load.statuses[200] > 20
        assert set(load.statuses) <= {0, 200, 500}
        assert load.statuses[0] + load.statuses[500] <= 8
