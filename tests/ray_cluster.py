"""A real Ray cluster of two nodes on this machine, for the tests of a session."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil
from serving_process import free_port

LONG_S = 120.0


def wait_until(condition: Callable[[], Any], *, within_s: float = LONG_S) -> Any:
    """Poll until the condition holds; returns what it returned."""
    give_up = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < give_up, condition
        time.sleep(0.1)
    return found


class RayCluster:
    """Two nodes: a head of one CPU, and `worker` of one CPU and the resource `worker`.

    Attributes:
        home: the model store of both.
        port: where Ray Serve's proxies answer.
    """

    def __init__(self, home: Path) -> None:
        from ray.cluster_utils import Cluster

        self.home = home
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 1,
                "resources": {"head": 10},
                "include_dashboard": True,
                "dashboard_port": free_port(),
            },
        )
        self.worker = self.add_node(resources={"worker": 10})

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add_node(self, **options: Any) -> Any:
        return self.cluster.add_node(num_cpus=1, **options)

    def settings(self, *, on: str | None = "head", **ray: Any) -> dict[str, Any]:
        """A deployment's settings: small replicas here, as many as are asked for.

        Args:
            on: the nodes with this resource, or any. Each further node starts a proxy.
        """
        if on is not None:
            ray["resources"] = {on: 0.001}
        return {
            "ray_address": self.address,
            "serving_backend": "hybrid",
            "port": self.port,
            "cpu_per_worker": 0.2,
            "ray_max_replicas": 1,
            "ray": ray,
        }

    def close(self) -> None:
        import ray
        from ray import serve

        with contextlib.suppress(Exception):
            serve.shutdown()
        ray.shutdown()
        self.cluster.shutdown()


def processes(name: str, of: int | None = None) -> list[psutil.Process]:
    """Ray's processes of this kind below one with this id; without it those of all nodes here."""
    found = []
    for process in psutil.Process(of).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def applications() -> dict[str, dict[str, Any]]:
    """What Ray itself tells of all applications, also of those that are not there yet."""
    from ray.serve.context import _get_global_client

    return dict(_get_global_client().get_serve_details()["applications"])


def replicas_of(application: str) -> list[dict[str, Any]]:
    """Ray's own list of an application's replicas that run: `pid`, `node_id`, …"""
    deployments = applications().get(application, {}).get("deployments", {}).values()
    return [
        replica
        for one in deployments
        for replica in one["replicas"]
        if str(getattr(replica["state"], "value", replica["state"])) == "RUNNING"
    ]


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def post(url: str, body: Mapping[str, Any], **options: Any) -> httpx.Response:
    return httpx.post(url, json=body, timeout=LONG_S, trust_env=False, **options)


def get(url: str, **options: Any) -> httpx.Response:
    return httpx.get(url, timeout=LONG_S, trust_env=False, **options)


def answers(url: str) -> bool:
    """Whether a service that waits answers at this address."""
    with contextlib.suppress(httpx.TransportError):
        return post(f"{url}/predict", {"input": 0}).is_success
    return False
