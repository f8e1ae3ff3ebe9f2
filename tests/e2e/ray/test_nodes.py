"""Nodes that differ: without BentoML, with a GPU, with a model store of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlops.errors import DeploymentError
from mlops.serving.ray import deploy, status
from ray_cluster import RayCluster, get, post, replicas_of
from ray_load import deployed

PREDICT = {"text": "What is a list?", "max_tokens": 3, "temperature": 0}


@contextmanager
def node(cluster: RayCluster, **options: Any) -> Iterator[Any]:
    """One more node, with the resource `more`."""
    added = cluster.add_node(resources={"more": 10}, **options)
    try:
        yield added
    finally:
        cluster.cluster.remove_node(added)


def test_ray_serve_alone_needs_no_bentoml(cluster: RayCluster, tmp_path: Path) -> None:
    (tmp_path / "bentoml").mkdir()
    (tmp_path / "bentoml" / "__init__.py").write_text("raise ImportError('no BentoML here')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    here = {**cluster.settings(on="more"), "ray_min_replicas": 1}
    with node(cluster, env_vars={"PYTHONPATH": path}, num_gpus=1):
        with pytest.raises(DeploymentError, match="no BentoML here"):
            deploy("tiny:1.0.0", here)
        assert status() == []  # one that fails leaves nothing
        with deployed("tiny:1.0.0", {**here, "serving_backend": "ray_serve"}) as url:
            answer = post(f"{url}/predict", {**PREDICT, "adapter": "ada"})
            assert answer.json()["adapter"] == "ada", answer.text
            assert get(f"{url}/health").json()["digest"].startswith("sha256:")
            assert get(f"{url}/openapi.json").status_code == 200
            assert get(f"{url}/v1/models/bob").status_code == 200
            assert get(f"{url}/nowhere").status_code == 404
            assert _gpus_in_use() == 1  # the cluster has one, and nothing was said about it
        settings = {**here, "serving_backend": "ray_serve"}
        settings["ray"] = {**settings["ray"], "num_gpus": 0}
        with deployed("tiny:1.0.0", settings):
            assert _gpus_in_use() == 0
        with pytest.raises(DeploymentError, match="a class in the Bento: use the backend 'hybrid'"):
            deploy("waiting:1.0.0", {**here, "serving_backend": "ray_serve"})


def _gpus_in_use() -> float:
    import ray

    return ray.cluster_resources()["GPU"] - ray.available_resources().get("GPU", 0)


def test_a_node_fetches_what_its_store_lacks_once(cluster: RayCluster, tmp_path: Path) -> None:
    home, source = tmp_path / "home", tmp_path / "shared"
    settings = {
        **cluster.settings(on="more", model_source=str(source)),
        "ray_min_replicas": 2,
        "ray_max_replicas": 2,
    }
    with node(cluster, env_vars={"BENTOML_HOME": str(home)}):
        without = cluster.settings(on="more")
        with pytest.raises(DeploymentError, match="no .*tiny:1.0.0"):
            deploy("tiny:1.0.0", without)
        with deployed("tiny:1.0.0", settings) as url:
            assert len(replicas_of("support-tiny")) == 2
            assert post(f"{url}/predict", {**PREDICT, "adapter": "dot"}).status_code == 200
        assert (home / "models" / "tiny" / "1.0.0" / "model.safetensors").is_file()

        # What was changed on the way is not served.
        changed = max((source / "blobs").iterdir(), key=lambda blob: blob.stat().st_size)
        changed.chmod(0o644)
        content = bytearray(changed.read_bytes())
        content[-1] ^= 1
        changed.write_bytes(content)
        import shutil

        shutil.rmtree(home)
        with pytest.raises(DeploymentError, match="tiny:1.0.0"):
            deploy("tiny:1.0.0", settings)
