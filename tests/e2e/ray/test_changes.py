"""Adapters and limits change while replicas run; updates and failures lose no request."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest

from mlops.errors import DeploymentError, PackagingError
from mlops.serving.bentoml.packager import package_model
from mlops.serving.ray import deploy, status
from ray_cluster import RayCluster, get, post, replicas_of, wait_until
from ray_load import Load, deployed
from ray_services import LATER_ADAPTER

PREDICT = {"text": "What is a list?", "max_tokens": 3, "temperature": 0}


def test_adapters_come_and_go_in_every_replica(cluster: RayCluster, folder: Path) -> None:
    packaged = package_model(
        str(folder / LATER_ADAPTER), "eve", "support", model_version="1.0.0",
        base_model="tiny:1.0.0", build_bento=False,
    )  # fmt: skip
    settings = {**cluster.settings(), "ray_min_replicas": 2, "ray_max_replicas": 2}
    with deployed("tiny:1.0.0", settings) as url:
        before = {one["pid"] for one in replicas_of("support-tiny")}
        asked = {**PREDICT, "adapter": "eve"}
        assert {post(f"{url}/predict", asked).status_code for _ in range(6)} == {404}

        deploy("tiny:1.0.0", settings, adapters={"eve": packaged["model_tag"]})
        assert {post(f"{url}/predict", asked).status_code for _ in range(10)} == {200}
        assert {one["pid"] for one in replicas_of("support-tiny")} == before

        # One that does not fit, or is not there, changes nothing.
        with pytest.raises(PackagingError, match="no model 'nobody'"):
            deploy("tiny:1.0.0", settings, adapters={"frog": "nobody"})
        with pytest.raises(DeploymentError, match="an adapter cannot be added: .*adapter"):
            deploy("tiny:1.0.0", settings, adapters={"cat": "eve:1.0.0", "frog": "tiny:1.0.0"})
        assert {post(f"{url}/predict", asked).status_code for _ in range(6)} == {200}
        cat = {**PREDICT, "adapter": "cat"}
        assert {post(f"{url}/predict", cat).status_code for _ in range(6)} == {404}

        limited = {**settings, "http": {"requests_per_minute": 2}, "timeout": 299}
        deploy("tiny:1.0.0", limited)
        assert {post(f"{url}/predict", asked).status_code for _ in range(2)} == {404}
        statuses = Counter(post(f"{url}/predict", PREDICT).status_code for _ in range(10))
        assert statuses[429] >= 6  # two replicas count for themselves
        assert {one["pid"] for one in replicas_of("support-tiny")} == before


def test_updates_lose_no_request(cluster: RayCluster) -> None:
    settings = cluster.settings()
    with (
        deployed("waiting:1.0.0", settings) as url,
        Load(f"{url}/predict", {"input": 0.05}) as load,
    ):
        # One that does not load: the old replicas go on.
        before = {one["pid"] for one in replicas_of("tests-waiting")}
        with pytest.raises(
            DeploymentError, match="the weights are not there; waiting:1.0.0 goes on serving$"
        ):
            deploy("waiting:3.0.0-broken", settings)
        wait_until(lambda: status()[0].status == "RUNNING")
        assert {one["pid"] for one in replicas_of("tests-waiting")} == before
        assert [one.plan.tag for one in status()] == ["waiting:1.0.0"]
        assert load.seen() == {"1.0.0"}

        # One that does.
        deploy("waiting:2.0.0", settings)
        wait_until(lambda: load.seen(time.monotonic() - 1) == {"2.0.0"})
    assert load.seen() == {"1.0.0", "2.0.0"}
    assert set(load.statuses) == {200}


def test_each_project_has_its_own_path(cluster: RayCluster) -> None:
    small = cluster.settings()
    with (
        deployed("waiting:1.0.0", {**small, "project_name": "one"}) as first,
        deployed(
            "waiting:2.0.0", {**small, "project_name": "two", "ray": {"route_prefix": "/2"}}
        ) as second,
    ):
        assert (first, second) == (f"{cluster.url}/one-waiting", f"{cluster.url}/2")
        answers = [post(f"{url}/predict", {"input": 0}).json() for url in (first, second)]
        assert [one["prediction"][0] for one in answers] == ["1.0.0", "2.0.0"]
        assert [one["project_name"] for one in answers] == ["one", "two"]
        with pytest.raises(DeploymentError, match="is the service 'waiting' of the project 'one'"):
            deploy("waiting:1.0.0", {**small, "project_name": "one!"})
        with pytest.raises(DeploymentError, match="/2 is being used"):
            deploy("waiting:1.0.0", {**small, "project_name": "x", "ray": {"route_prefix": "/2"}})
        assert get(f"{second}/health").status_code == 200


def test_load_brings_replicas(cluster: RayCluster) -> None:
    settings = {
        **cluster.settings(upscale_delay_s=0, target_ongoing_requests=2),
        "max_batch_size": 4, "ray_min_replicas": 1, "ray_max_replicas": 2,
    }  # fmt: skip
    with deployed("waiting:1.0.0", settings) as url:
        with Load(f"{url}/predict", {"input": 0.3}, num_clients=8) as load:
            wait_until(lambda: len(replicas_of("tests-waiting")) == 2)
            wait_until(lambda: len({one.json()["prediction"][1] for _, one in load.answers}) == 2)
        assert set(load.statuses) == {200}
