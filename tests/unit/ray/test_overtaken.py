"""A deployment ends at once when Ray Serve was told something else since."""

from __future__ import annotations

import pytest

from mlops.errors import DeploymentError
from mlops.serving.ray.deploy import _not_overtaken
from mlops.serving.ray.deployment import Plan
from mlops.serving.ray.running import RunningApplication

OLD, OURS, OTHER = (
    Plan(f"chat:{version}.0.0", "sha256:" + version * 64, {"service_name": "chat"})
    for version in ("1", "2", "3")
)
SCALED = OURS.with_config(ray_min_replicas=3, ray_max_replicas=3)


def running(plan: Plan | None, status: str = "DEPLOYING") -> RunningApplication:
    return RunningApplication("chat", plan, status)


@pytest.mark.parametrize("was_seen", [True, False])
@pytest.mark.parametrize(
    ("now", "by"),
    [
        (None, "mlops undeploy chat"),
        (running(None, "DELETING"), "mlops undeploy chat"),
        (running(OURS, "DELETING"), "mlops undeploy chat"),
        (running(OTHER), "chat:3.0.0 with 1:4 replicas"),
        (running(SCALED, "RUNNING"), "chat:2.0.0 with 3 replicas"),
    ],
)
def test_what_has_overtaken_it_is_said(
    now: RunningApplication | None, by: str, was_seen: bool
) -> None:
    with pytest.raises(DeploymentError, match="chat:2.0.0 was overtaken by") as caught:
        _not_overtaken(OURS, running(OLD), now, was_seen)
    assert by in str(caught.value)


def test_what_was_there_before_is_told_for_a_moment() -> None:
    before = running(OLD, "RUNNING")
    assert _not_overtaken(OURS, before, before, was_seen=False) is before
    with pytest.raises(DeploymentError, match="overtaken by a deployment of chat:1.0.0"):
        _not_overtaken(OURS, before, before, was_seen=True)


@pytest.mark.parametrize("now", [running(OURS), running(OURS, "UNHEALTHY"), running(None)])
def test_what_was_asked_for_is_not_overtaken(now: RunningApplication) -> None:
    assert _not_overtaken(OURS, running(OLD), now, was_seen=True) is now
