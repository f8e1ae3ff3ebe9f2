"""What a deployment is to run, as plain data, and what Ray Serve is told of it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.serve.schema import ServeDeploySchema

from mlops.errors import ConfigError, DeploymentError
from mlops.serving.ray.application import bind, build
from mlops.serving.ray.deployment import Plan

# Ray would rather have it in the environment, for all deployments of a cluster.
pytestmark = pytest.mark.filterwarnings("ignore:The .metrics_interval_s. field:DeprecationWarning")

DIGEST = "sha256:" + "1" * 64
PLAN = Plan("chat:1.0.0", DIGEST, {"service_name": "chat", "serving_backend": "hybrid"})
FULL = Plan(
    "chat:1.0.0",
    DIGEST,
    {
        "service_name": "chat",
        "project_name": "support",
        "serving_backend": "ray_serve",
        "timeout": 20,
        "labels": {"team": "ml"},
        "http": {"requests_per_minute": 6, "cors_origins": ["*"]},
        "ray": {"resources": {"accelerator": 0.5}, "route_prefix": "/v2"},
    },
    ("casual", "formal"),
    {
        "model_path": "chat:1.0.0",
        "model_type": "mlx",
        "base_model": None,
        "adapters": {"formal": f"formal:1.0.0@{DIGEST}"},
        "digest": DIGEST,
    },
    {"brief": f"brief:1.0.0@{DIGEST}"},
)


@pytest.mark.parametrize("plan", [PLAN, FULL])
def test_a_plan_comes_back_from_json(plan: Plan) -> None:
    written = json.dumps(plan.to_dict(), allow_nan=False)
    assert Plan.from_dict(json.loads(written)) == plan
    assert Plan.from_dict(json.loads(written)).version == plan.version


def test_what_is_empty_is_not_written() -> None:
    assert Plan("chat:1.0.0", DIGEST, {}).to_dict() == {"tag": "chat:1.0.0", "digest": DIGEST}


@pytest.mark.parametrize(
    "values",
    [
        *(None, [], "gold", 5, {}, {1: 2}, {"tag": "a"}, {"digest": DIGEST}),
        {"tag": "a", "digest": DIGEST, "replicas": 2},
        {"tag": "a", "digest": DIGEST, "adapters": 5},
        {"tag": "a", "digest": DIGEST, "adapters": None},
    ],
)
def test_what_is_no_plan_is_refused(values: Any) -> None:
    for read in (Plan.from_dict, build):
        with pytest.raises(DeploymentError, match="not a deployment of this toolkit"):
            read(values)


@pytest.mark.parametrize(
    "given", [5, [1], {"worker": 2}, {"ray": {"gpus": 1}}, {"timeout": "long"}]
)
def test_settings_of_a_plan_are_checked(given: Any) -> None:
    plan = Plan.from_dict({"tag": "a", "digest": DIGEST, "settings": given})
    with pytest.raises(ConfigError):
        _ = plan.config


# What replaces running replicas, and what does not.


@pytest.mark.parametrize(
    "changes",
    [
        {"max_batch_size": 8},
        {"max_resident_adapters": 2},
        {"max_latency_ms": 20},
        {"cpu_per_worker": 2},
        {"memory_per_worker_mb": 512},
        {"enable_metrics": False},
        {"enable_swagger": False},
        {"serving_backend": "ray_serve"},
        {"apple_silicon": {"enable_mps": False}},
        {"http": {"max_body_bytes": 2048}},
        {"http": {"api_key_file": "/run/keys"}},
        {"http": {"log_prompts": True}},
        {"ray": {"num_gpus": 1}},
        {"ray": {"resources": {"accelerator": 1}}},
        {"stuck_after_s": 5},
        {"ray": {"adapter_affinity": False}},
    ],
)
def test_what_a_replica_reads_at_its_start_makes_a_new_version(changes: dict[str, Any]) -> None:
    assert PLAN.with_config(**changes).version != PLAN.version


@pytest.mark.parametrize(
    "changes",
    [
        {"workers": 2},
        {"ray_min_replicas": 2, "ray_max_replicas": 8},
        {"timeout": 20},
        {"http": {"requests_per_minute": 6, "max_concurrent_requests": 2}},
        {"ray": {"model_source": "/mnt/models"}},
        {"ray": {"route_prefix": "/v2"}},
        {"ray": {"target_ongoing_requests": 4, "upscale_delay_s": 1, "downscale_delay_s": 1}},
        {"ray": {"max_surge_percent": 100}},
        {"ray_address": "auto"},
        {"host": "0.0.0.0", "port": 8000},  # noqa: S104
    ],
)
def test_what_can_be_taken_over_keeps_the_version(changes: dict[str, Any]) -> None:
    changed = PLAN.with_config(**changes)
    assert changed.config != PLAN.config
    assert changed.version == PLAN.version


def test_other_content_is_another_version() -> None:
    others = [
        replace(PLAN, digest="sha256:" + "2" * 64),
        replace(PLAN, tag="chat:1.1.0"),
        replace(PLAN, adapters=("formal",)),
        replace(PLAN, recipe={"model_path": "chat:1.0.0"}),
    ]
    assert len({PLAN.version, *(one.version for one in others)}) == 5


def test_further_adapters_need_no_restart() -> None:
    added = replace(PLAN, added={"brief": f"brief:1.0.0@{DIGEST}"})
    assert added.version == PLAN.version
    assert added.user_config["adapters"] == {"brief": f"brief:1.0.0@{DIGEST}"}
    assert added.user_config != PLAN.user_config


def test_with_config_keeps_the_rest() -> None:
    changed = FULL.with_config(http={"log_prompts": True}, ray_max_replicas=2)
    assert changed.config.http.requests_per_minute == 6
    assert changed.config.http.log_prompts
    assert changed.config.ray.route_prefix == "/v2"
    assert replace(changed, settings=FULL.settings) == FULL
    with pytest.raises(ConfigError, match="ray_max_replicas"):
        FULL.with_config(ray_min_replicas=3, ray_max_replicas=2)


# Names and routes.


@pytest.mark.parametrize(
    ("project", "application"),
    [
        ("default", "chat"),
        ("support", "support-chat"),
        ("lora-finetuning-mlx", "lora-finetuning-mlx-chat"),
        ("two words", "two-words-chat"),
        ("team/a//b", "team-a-b-chat"),
        ("/support/", "support-chat"),
        ("../..", "chat"),
        ("Öl", "l-chat"),
        ("日本", "chat"),
    ],
)
def test_an_application_is_named_after_project_and_service(project: str, application: str) -> None:
    plan = PLAN.with_config(project_name=project)
    assert plan.application == application
    assert plan.route_prefix == f"/{application}"
    assert plan.deployment == "chat"


def test_route_and_deployment_can_be_chosen() -> None:
    plan = FULL.with_config(ray_deployment_name="replicas")
    assert (plan.application, plan.route_prefix) == ("support-chat", "/v2")
    assert plan.deployment == plan.options()["name"] == "replicas"
    assert FULL.with_config(ray={"route_prefix": "/"}).route_prefix == "/"


lines = st.text(st.characters(categories=("L", "N", "P", "Zs")), min_size=1, max_size=40)


@settings(max_examples=30)
@given(
    lines.filter(str.isprintable),
    st.from_regex(r"s-[-._A-Za-z0-9]{0,20}[A-Za-z0-9]", fullmatch=True),
)
def test_ray_takes_every_name(project: str, service: str) -> None:
    plan = PLAN.with_config(project_name=project, service_name=service)
    ServeDeploySchema.model_validate(plan.to_serve_config())


# What Ray Serve is told.


def schema_of(plan: Plan) -> Any:
    """What `serve deploy` makes of the plan's YAML."""
    written = yaml.safe_dump(plan.to_serve_config(), sort_keys=False, allow_unicode=True)
    return ServeDeploySchema.model_validate(yaml.safe_load(written))


def test_serve_deploy_takes_the_plan_as_yaml() -> None:
    deployed = schema_of(FULL.with_config(host="0.0.0.0", port=8000, ray_max_replicas=2))  # noqa: S104
    assert (deployed.http_options.host, deployed.http_options.port) == ("0.0.0.0", 8000)  # noqa: S104
    (application,) = deployed.applications
    assert (application.name, application.route_prefix) == ("support-chat", "/v2")
    assert application.import_path == "mlops.serving.ray.application:build"
    (deployment,) = application.deployments
    assert deployment.name == "chat"
    assert deployment.ray_actor_options.resources == {"accelerator": 0.5}
    assert deployment.max_ongoing_requests == 64
    assert deployment.autoscaling_config["max_replicas"] == 2
    given = json.loads(json.dumps(application.args))
    plan = Plan.from_dict(given)
    assert (plan.config.port, plan.added, plan.recipe) == (8000, FULL.added, FULL.recipe)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ray_min_replicas": 3, "ray_max_replicas": 3},
        {"max_batch_size": 1, "timeout": 0.5},
        {"cpu_per_worker": 0.5, "memory_per_worker_mb": 512},
        {"ray": {"upscale_delay_s": 0, "downscale_delay_s": 0, "target_ongoing_requests": 0.5}},
        {"ray": {"num_gpus": 0.5, "resources": {"accelerator": 2}, "max_surge_percent": 0}},
        {"ray": {"max_surge_percent": 100, "route_prefix": "/"}},
    ],
)
def test_ray_takes_every_setting(changes: dict[str, Any]) -> None:
    plan = FULL.with_config(**changes)
    schema_of(plan)
    bind(plan)  # refuses what Ray does not know
    build(plan.to_dict())


def test_a_gpu_is_taken_where_nothing_is_said_about_it() -> None:
    def gpus(plan: Plan, found: float) -> Any:
        return plan.options(num_gpus=found)["ray_actor_options"].get("num_gpus")

    assert gpus(PLAN, 1) == 1
    assert gpus(PLAN, 0) is None
    assert gpus(PLAN.with_config(ray={"num_gpus": 0.25}), 1) == 0.25
    assert gpus(PLAN.with_config(ray={"num_gpus": 0}), 1) is None


def test_replicas_are_told_what_may_change() -> None:
    told = json.loads(json.dumps(FULL.user_config))
    assert told["limits"] == {
        "timeout": 20,
        "http": {"requests_per_minute": 6, "max_concurrent_requests": None},
    }
    assert told["adapters"] == FULL.added
    assert Plan.from_dict(told["plan"]) == FULL
    assert PLAN.config.with_changes(told["limits"]).http.requests_per_minute == 6


def test_a_service_that_does_not_run_on_ray_has_no_options() -> None:
    with pytest.raises(ConfigError, match="use 'hybrid' or 'ray_serve'"):
        PLAN.with_config(serving_backend="bentoml").options()
