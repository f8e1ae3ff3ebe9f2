"""What Ray tells, in our words."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError, RayTaskError
from ray.serve.schema import ApplicationDetails

from mlops.errors import DeploymentError, MLOpsError
from mlops.serving.ray.cluster import translated
from mlops.serving.ray.deployment import IMPORT_PATH, Plan
from mlops.serving.ray.running import RunningApplication, reason_of, room_missing

PLAN = Plan("chat:1.0.0", "sha256:" + "1" * 64, {"service_name": "chat", "project_name": "support"})

FAILED_TO_START = (
    "The deployment failed to start 3 times in a row. This may be due to a problem with its "
    "constructor or initial health check failing. See controller logs for details. Error:\n"
)
_CALL = "ServeReplica:support-chat:chat.initialize_and_get_metadata()"
REPLICA = f"\x1b[36mray::{_CALL}\x1b[39m (pid=1, ip=127.0.0.1, actor_id=5a, repr=<X object>)\n"
FRAMES = (
    '  File "/usr/lib/python3.11/concurrent/futures/_base.py", line 456, in result\n'
    "    return self.__get_result()\n"
    "           ^^^^^^^^^^^^^^^^^^^\n"
    '  File "/srv/mlops/serving/ray/deployment.py", line 230, in fetch\n'
    "    raise DeploymentError(\n"
)
TOLD = "this node's store has another chat:1.0.0 (sha256:2, not sha256:1): remove it there"


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (f"mlops.errors.DeploymentError: {TOLD}", TOLD),
        ("mlops.errors.IntegrityError: a: b: c", "a: b: c"),
        ("RuntimeError: the weights are not there", "RuntimeError: the weights are not there"),
        ("KeyError: 'x'", "KeyError: 'x'"),
        ("service.helpers.WrongError: no", "WrongError: no"),
        ("bentoml.exceptions.BentoMLException: no", "BentoMLException: no"),
        ("RuntimeError: first line\nsecond: line\nthird", "RuntimeError: first line"),
        ("MemoryError", "MemoryError"),
    ],
)
def test_the_reason_is_the_last_error_of_a_traceback(last: str, reason: str) -> None:
    assert reason_of(FAILED_TO_START + REPLICA + FRAMES + last + "\n") == reason
    cause = f"Traceback (most recent call last):\n{FRAMES}ValueError: 5\n\n"
    because = "The above exception was the direct cause of the following exception:\n\n"
    if ":" in last:
        assert reason_of(FAILED_TO_START + cause + because + REPLICA + FRAMES + last) == reason


def test_the_reason_of_an_error_that_came_from_another_process() -> None:
    traceback = f"{REPLICA}{FRAMES}mlops.errors.DeploymentError: {TOLD}"
    told = RayTaskError("check_adapters", traceback, DeploymentError(TOLD, "fetch"))
    assert reason_of(str(told.as_instanceof_cause())) == TOLD


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no reason was given"),
        (" \n\t\n", "no reason was given"),
        ("Deleting.", "Deleting."),
        ("A replica's health check failed.\nIt is replaced.\n", "It is replaced."),
        ("see this: it is no Error: at all", "see this: it is no Error: at all"),
        ("Resources required: {'CPU': 1}", "Resources required: {'CPU': 1}"),
    ],
)
def test_without_a_traceback_the_reason_is_the_last_line(text: str, reason: str) -> None:
    assert reason_of(text) == reason


@given(st.text(max_size=200), st.integers(1, 100))
def test_a_reason_is_one_line_that_can_be_read(text: str, times: int) -> None:
    reason = reason_of(text * times)
    assert 0 < len(reason) <= 2000
    assert len(reason.splitlines()) == 1
    assert reason_of(f"ValueError: {'x' * 10**6}").startswith("ValueError: xxx")


ERRORS = [
    *(ValueError("two\nlines"), RuntimeError(""), ConnectionError("gone"), TimeoutError()),
    *(GetTimeoutError("too slow"), ActorDiedError(), RayError("something")),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("is_there", [True, False])
def test_rays_errors_are_ours(error: Exception, is_there: bool) -> None:
    with socket.socket() as gcs:
        gcs.bind(("127.0.0.1", 0))
        if is_there:
            gcs.listen()
        address = f"127.0.0.1:{gcs.getsockname()[1]}"
        with pytest.raises(DeploymentError) as caught, translated(address):
            raise error
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)
    if not isinstance(error, ValueError):
        assert (" is gone: " in str(caught.value)) is not is_there


def test_our_errors_and_mistakes_stay_as_they_are() -> None:
    for error in (MLOpsError("ours"), KeyError("a mistake")):
        with pytest.raises(type(error)) as caught, translated("auto"):
            raise error
        assert caught.value is error


# What runs.


def replica(state: str, number: int) -> dict[str, Any]:
    told = {"replica_id": f"r{number}", "state": state, "start_time_s": 0.0, "pid": number}
    place = {} if state == "STARTING" else {"node_id": "1"}
    return {**told, **place, "actor_name": f"SERVE_REPLICA::support-chat#chat#r{number}"}


def deployment(
    user_config: Any, *states: str, target: int = 0, message: str = "", status: str = "HEALTHY"
) -> dict[str, Any]:
    return {
        "name": "chat",
        "status": status,
        "status_trigger": "CONFIG_UPDATE_COMPLETED",
        "message": message,
        "deployment_config": {"name": "chat", "user_config": user_config},
        "target_num_replicas": target,
        "required_resources": {"CPU": 1},
        "replicas": [replica(state, number) for number, state in enumerate(states)],
    }


def details(
    *deployments: dict[str, Any], status: str = "RUNNING", message: str = "", mode: str = "json"
) -> dict[str, Any]:
    """As Ray tells: its own schema checks that they have the form. It leaves out what is unset."""
    told = {
        "name": "support-chat",
        "route_prefix": "/support-chat",
        "docs_path": None,
        "status": status,
        "message": message,
        "last_deployed_time_s": 1.0,
        "source": "imperative",
        "external_scaler_enabled": False,
        "deployments": {f"d{number}": one for number, one in enumerate(deployments)},
    }
    found = ApplicationDetails.model_validate(told)
    return dict(found.model_dump(mode=mode, exclude_unset=True))


PLAN_CONFIG = {"plan": PLAN.to_dict(), "adapters": {}, "limits": {}}


@pytest.mark.parametrize("mode", ["json", "python"])  # with enumerations as texts, and as they are
def test_an_application_of_ours_is_read(mode: str) -> None:
    states = ("RUNNING", "STARTING", "RUNNING", "STOPPING")
    told = details(deployment(PLAN_CONFIG, *states, target=3), status="DEPLOYING", mode=mode)
    found = RunningApplication.read("support-chat", told)
    assert found == RunningApplication(
        "support-chat",
        PLAN,
        "DEPLOYING",
        "",
        {"RUNNING": 2, "STARTING": 1, "STOPPING": 1},
        3,
        needs={"CPU": 1},
        placed=tuple(f"SERVE_REPLICA::support-chat#chat#r{number}" for number in (0, 2, 3)),
        unplaced=("SERVE_REPLICA::support-chat#chat#r1",),
    )
    assert (found.num_running, found.tag) == (2, "chat:1.0.0")
    assert found.replica_states == "2 running, 1 starting, 1 stopping of 3"


def test_why_it_failed_is_what_its_deployment_says() -> None:
    """Of the application Ray says no more than which deployment it was."""
    reason = f"{FAILED_TO_START}{REPLICA}{FRAMES}mlops.errors.DeploymentError: {TOLD}"
    told = details(
        deployment(PLAN_CONFIG, message=reason, status="DEPLOY_FAILED"),
        status="DEPLOY_FAILED",
        message="Failed to update the deployments ['chat'].",
    )
    found = RunningApplication.read("support-chat", told)
    assert (found.status, found.num_running) == ("DEPLOY_FAILED", 0)
    assert reason_of(found.message) == TOLD


def test_what_the_application_alone_says_is_told() -> None:
    told = details(deployment(PLAN_CONFIG), status="DEPLOY_FAILED", message="no such module")
    found = RunningApplication.read("support-chat", told)
    assert found.message == "no such module"


@pytest.mark.parametrize(
    "user_config",
    [
        None,
        {},
        {"threshold": 1},
        {"plan": "gold"},
        {"plan": {"kind": "weekly"}},
        {"plan": None},
    ],
)
def test_the_applications_of_others_are_none_of_ours(user_config: Any) -> None:
    told = details(deployment(user_config, "RUNNING", target=1))
    found = RunningApplication.read("other", told)
    assert (found.plan, found.is_foreign, found.status) == (None, True, "RUNNING")


@pytest.mark.parametrize("status", ["DEPLOYING", "DELETING"])
def test_an_application_without_deployments_has_a_state_all_the_same(status: str) -> None:
    found = RunningApplication.read("support-chat", details(status=status))
    assert (found.plan, found.is_foreign, found.status) == (None, False, status)
    assert (found.tag, found.replica_states) == ("", "")


@pytest.mark.parametrize("is_ours", [True, False])
def test_of_an_application_from_a_file_the_file_tells(is_ours: bool) -> None:
    """Ray is still building it: there are no deployments."""
    path = IMPORT_PATH if is_ours else "theirs:app"
    file = {"name": "support-chat", "import_path": path, "args": PLAN.to_dict()}
    told = {**details(status="DEPLOYING"), "source": "declarative", "deployed_app_config": file}
    found = RunningApplication.read("support-chat", told)
    assert (found.plan, found.is_foreign) == ((PLAN, False) if is_ours else (None, True))
    assert found.is_from_file


def test_room_is_counted_by_node() -> None:
    needs = {"CPU": 1.0, "memory": 2.0**30}
    total = {"a": {"CPU": 2.0, "memory": 2.0**31}, "b": {"CPU": 0.5}}
    assert room_missing(needs, total, total) == ""
    free = {"a": {"CPU": 0.5, "memory": 2.0**30}, "b": {"CPU": 0.5}}
    assert room_missing(needs, free, total) == (
        "no node has room for a replica, which takes 1 CPU, 1024 MB of memory: "
        "a has 0.5 CPU, 1024 MB of memory free of 2 CPU, 2048 MB of memory; "
        "b has 0.5 CPU, 0 MB of memory free of 0.5 CPU, 0 MB of memory"
    )
    many = {f"n{number}": {"CPU": 0.1} for number in range(20)}
    assert room_missing(needs, {}, many).endswith("; 12 more have no room either")


def test_ours_is_found_among_other_deployments() -> None:
    told = details(deployment(None, "RUNNING"), deployment(PLAN_CONFIG, "STARTING", target=1))
    found = RunningApplication.read("support-chat", told)
    assert (found.plan, found.replicas, found.target) == (PLAN, {"STARTING": 1}, 1)
