"""What dies on a cluster is replaced, and nobody waits for ever."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from mlops.serving.ray import status
from ray_cluster import RayCluster, answers, post, processes, replicas_of, wait_until
from ray_load import Load, deployed


def test_replicas_proxies_and_the_controller_are_replaced(cluster: RayCluster) -> None:
    with deployed("waiting:1.0.0", {**cluster.settings(), "max_batch_size": 2}) as url:
        with Load(f"{url}/predict", {"input": 0.1}, num_clients=8) as load:
            # A replica: those that it answered fail, those that wait do not.
            (replica,) = replicas_of("tests-waiting")
            os.kill(replica["pid"], signal.SIGKILL)
            killed_s = time.monotonic()
            wait_until(lambda: load.seen(killed_s))
            # 0: the new one may be on the other node, and with it the proxy that stays.
            assert set(load.statuses) <= {0, 200, 500}
            assert 0 < load.statuses[500] <= 4  # what a replica is sent at once

            # The controller: nobody notices.
            failures = load.statuses[500]
            for controller in processes("ray::ServeController"):  # forks of it among them
                controller.kill()
            since_s = time.monotonic()
            wait_until(lambda: processes("ray::ServeController"))
            wait_until(lambda: load.seen(since_s + 1))
            wait_until(lambda: status()[0].status == "RUNNING")
            assert load.statuses[500] == failures
            assert set(load.statuses) <= {0, 200, 500}

        # The proxies: connections break, and are taken again.
        for proxy in processes("ray::ProxyActor"):
            proxy.kill()
        wait_until(lambda: answers(url))


def test_a_node_that_dies_takes_its_own_requests_only(cluster: RayCluster) -> None:
    one_each = {"cpu_per_worker": 0.6, "ray_min_replicas": 2, "ray_max_replicas": 2}
    with deployed("waiting:1.0.0", {**cluster.settings(), **one_each}) as url:
        nodes = {one["node_id"] for one in replicas_of("tests-waiting")}
        assert len(nodes) == 2
        with Load(f"{url}/predict", {"input": 0.05}) as load:
            cluster.cluster.remove_node(cluster.worker, allow_graceful=False)
            killed_s = time.monotonic()
            try:
                wait_until(lambda: load.seen(killed_s + 3))
                wait_until(lambda: len(replicas_of("tests-waiting")) == 1)
            finally:
                cluster.worker = cluster.add_node(resources={"worker": 10})
            wait_until(lambda: len(replicas_of("tests-waiting")) == 2)
        assert load.statuses[200] > 20
        assert set(load.statuses) <= {0, 200, 500}
        assert load.statuses[0] + load.statuses[500] <= 8


def test_an_engine_that_stands_still_is_replaced(cluster: RayCluster) -> None:
    settings = {**cluster.settings(stuck_after_s=1), "timeout": 2}
    with deployed("waiting:1.0.0", settings) as url:
        (before,) = replicas_of("tests-waiting")
        assert post(f"{url}/predict", {"input": "hang"}).status_code == 504
        is_new: Callable[[], bool] = lambda: any(  # noqa: E731
            one["pid"] != before["pid"] for one in replicas_of("tests-waiting")
        )
        wait_until(is_new)
        wait_until(lambda: answers(url))
