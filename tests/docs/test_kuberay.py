"""The manifest for KubeRay goes together with what `mlops deploy --dry-run` prints."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from documents import REPOSITORY

from mlops.serving.ray.deployment import Plan

MANIFEST = REPOSITORY / "examples" / "kuberay" / "rayservice.yaml"
SETTINGS = {"service_name": "helpdesk", "host": "0.0.0.0", "serving_backend": "hybrid"}  # noqa: S104


def appended() -> dict[str, Any]:
    """The manifest as docs/scaling.md completes it."""
    served = yaml.safe_dump(Plan("helpdesk:1.0.0", "sha256:0", SETTINGS).to_serve_config())
    lines = [f"    {line}" for line in served.splitlines()]
    text = "\n".join([MANIFEST.read_text(encoding="utf-8") + "  serveConfigV2: |", *lines])
    manifest: dict[str, Any] = yaml.safe_load(text)
    return manifest


def containers(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = manifest["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [one for group in groups for one in group["template"]["spec"]["containers"]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray, when it is imported
def test_what_is_served_can_be_appended() -> None:
    from ray.serve.schema import ServeDeploySchema

    manifest = appended()
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    served = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    assert served.http_options.host == "0.0.0.0"  # noqa: S104
    for container in containers(manifest):
        ports = {one["name"]: one["containerPort"] for one in container["ports"]}
        assert ports["serve"] == served.http_options.port


def test_pods_outlive_their_requests() -> None:
    manifest = appended()
    (served,) = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
    timeout_s = served["deployments"][0]["graceful_shutdown_timeout_s"]
    (group,) = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    variables = {one["name"]: one["value"] for one in pod["containers"][0]["env"]}
    drain_s = float(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert timeout_s < drain_s < pod["terminationGracePeriodSeconds"]
    replicas = served["deployments"][0]["autoscaling_config"]["max_replicas"]
    assert group["maxReplicas"] > replicas
