"""A Bento on a real Ray cluster answers as anywhere else; updates lose nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving_process import BENTOML, ServingProcess

from mlops.errors import ConfigError, DeploymentError
from mlops.serving.ray import Deployed, deploy, scale, status, undeploy
from ray_cluster import RayCluster, get, post, replicas_of, wait_until
from ray_services import ADAPTERS

PREDICT = {"text": "What is a list?", "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def tiny(started_cluster: RayCluster, home: Path) -> Iterator[Deployed]:
    """The language model with two replicas, one on each node."""
    from ray_cluster import environment

    with environment(BENTOML_HOME=str(home)):
        deployed = deploy(
            "tiny:1.0.0",
            {**started_cluster.settings(on=None), "ray_min_replicas": 2, "ray_max_replicas": 2},
        )
    yield deployed
    undeploy(deployed.application)


def test_the_summary_names_what_runs(cluster: RayCluster, tiny: Deployed) -> None:
    assert tiny.bento_tag == "tiny:1.0.0"
    assert tiny.num_replicas == 2
    assert tiny.url == f"{cluster.url}/support-tiny"
    assert tiny.log_folder is not None and list(tiny.log_folder.glob("serve/replica_*.log"))
    assert get(str(tiny.dashboard_url)).status_code == 200
    (running,) = status()
    assert (running.name, running.status, running.num_running) == ("support-tiny", "RUNNING", 2)


def test_every_answer_is_that_of_bentoml_serve(
    cluster: RayCluster, tiny: Deployed, home: Path, tmp_path: Path
) -> None:
    with ServingProcess((*BENTOML, "serve", "tiny:1.0.0"), tmp_path, home) as bento:
        bento.wait_until_ready()
        for method, path, body in (
            ("POST", "/predict", PREDICT),
            ("POST", "/predict", {**PREDICT, "adapter": "ada"}),
            ("POST", "/predict", {**PREDICT, "adapter": "nobody"}),
            ("POST", "/predict", {"text": "a", "max_tokens": -1}),
            (
                "POST",
                "/v1/completions",
                {"model": "bob", "prompt": "a", "max_tokens": 4, "seed": 1},
            ),
            ("POST", "/v1/completions", {"model": "nobody", "prompt": "a"}),
            ("POST", "/v1/chat/completions", {"model": "tiny", "messages": []}),
            ("GET", "/v1/models/cyd", None),
            ("GET", "/nowhere", None),
            ("GET", "/predict", None),
            ("GET", "/readyz", None),
            ("GET", "/openapi.json", None),
        ):
            here, there = (
                httpx.request(method, url + path, json=body, timeout=60, trust_env=False)
                for url in (tiny.url, bento.url)
            )
            assert here.status_code == there.status_code, (path, here.text)
            assert _stable(here) == _stable(there), path


def _stable(response: httpx.Response) -> object:
    """An answer without what differs from one to the next: times and ids."""
    try:
        content = response.json()
    except ValueError:
        return response.text
    for name in ("timings", "id", "created", "servers"):
        if isinstance(content, dict):
            content.pop(name, None)
    return content


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_stream_comes_in_pieces_whichever_replica_it_reaches(
    cluster: RayCluster, tiny: Deployed, adapter: str
) -> None:
    body = {"model": adapter, "prompt": "a", "max_tokens": 12, "stream": True, "temperature": 0}
    texts = set()
    for _ in range(4):  # some reach the adapter's replica at once, some do not
        events = []
        with httpx.stream(
            "POST", f"{tiny.url}/v1/completions", json=body, timeout=60, trust_env=False
        ) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            assert response.headers.get_list("x-request-id") == response.headers.get_list(
                "X-Request-ID"
            )
            assert len(response.headers.get_list("x-request-id")) == 1
            events = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        texts.add("".join(json.loads(one)["choices"][0]["text"] for one in events[:-1]))
    assert len(texts) == 1


def test_each_adapter_is_loaded_by_one_replica_only(cluster: RayCluster, tiny: Deployed) -> None:
    for _ in range(6):
        for adapter in ADAPTERS:
            assert post(f"{tiny.url}/predict", {**PREDICT, "adapter": adapter}).status_code == 200
    finished = Counter[str]()
    for engine in _engines(tiny, 2):
        for name, counts in engine["adapters"].items():
            if name in ADAPTERS and counts["completion_tokens"]:
                finished[name] += 1
    assert finished == Counter(ADAPTERS)


def _engines(deployed: Deployed, num_replicas: int) -> list[dict]:
    """The engine's statistics of every replica; a request reaches one of them."""
    found: dict[int, dict] = {}

    def all_seen() -> bool:
        metrics = get(f"{deployed.url}/metrics", headers={"connection": "close"}).json()
        found[metrics["process_id"]] = metrics["engine"]
        return len(found) == num_replicas

    wait_until(all_seen)
    return list(found.values())


def test_rays_exporter_tells_of_every_replica(cluster: RayCluster, tiny: Deployed) -> None:
    import ray
    from prometheus_client.parser import text_string_to_metric_families

    def samples() -> dict[str, list]:
        found: dict[str, list] = {}
        for node in ray.nodes():
            if node["Alive"] and node["MetricsExportPort"]:
                url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
                for family in text_string_to_metric_families(get(url).text):
                    for sample in family.samples:
                        if sample.labels.get("application") == tiny.application:
                            found.setdefault(sample.name, []).append(sample)
        return found

    for _ in range(20):
        assert post(f"{tiny.url}/predict", {**PREDICT, "adapter": "ada"}).status_code == 200
    names = ("ray_mlops_requests_total", "ray_mlops_model_loaded",
             "ray_mlops_time_to_first_token_seconds_count")  # fmt: skip
    found = wait_until(lambda: set(names) <= set(samples()) and samples())
    loaded = [one for one in found["ray_mlops_model_loaded"] if one.value == 1]
    assert len({one.labels["replica"] for one in loaded}) == 2
    assert {one.labels["project"] for one in loaded} == {"support"}

    def counted() -> float:
        return sum(
            one.value
            for one in samples()["ray_mlops_requests_total"]
            if one.labels["route"] == "/predict" and one.labels["adapter"] == "ada"
            and one.labels["status"] == "200"
        )  # fmt: skip

    wait_until(lambda: counted() >= 20)


def test_replicas_come_and_go_without_a_restart(cluster: RayCluster, tiny: Deployed) -> None:
    before = {one["pid"] for one in replicas_of(tiny.application)}
    assert scale(tiny.application, 1).num_replicas >= 1
    wait_until(lambda: len(replicas_of(tiny.application)) == 1)
    assert {one["pid"] for one in replicas_of(tiny.application)} < before
    assert scale(tiny.application, 2).num_replicas == 2
    with pytest.raises(DeploymentError, match="no application 'other'.*support-tiny"):
        scale("other", 2)
    with pytest.raises(ConfigError, match="ray_min_replicas"):
        scale(tiny.application, 0)


def test_the_backend_must_be_ray(cluster: RayCluster) -> None:
    with pytest.raises(ConfigError, match="use 'hybrid' or 'ray_serve'"):
        deploy("tiny:1.0.0", {"serving_backend": "bentoml"})
    with pytest.raises(DeploymentError, match="no Bento 'nothing:1'.*bentoml list"):
        deploy("nothing:1", cluster.settings())
