"""What BentoML and Ray Serve are told reaches them."""

from __future__ import annotations

from typing import Any

import pytest

from mlops.errors import ConfigError
from mlops.serving.bentoml.config import BentoMLConfig, ServingBackend
from mlops.serving.bentoml.ray_options import RayOptions


@pytest.fixture
def bentoml_settings(bentoml_home: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a BentoML service from a configuration; returns it and what BentoML read from it."""
    import bentoml
    from bentoml._internal.configuration.containers import BentoMLContainer
    from simple_di import sentinel

    def serve(config: BentoMLConfig) -> tuple[Any, Any]:
        # What a service injects stays in the process: each test begins without.
        monkeypatch.setattr(BentoMLContainer.config, "_cache", sentinel)
        service = bentoml.service(name=config.service_name, **config.to_bentoml_config())(
            type("Served", (), {})
        )
        service.inject_config()
        return service, BentoMLContainer.config.services[config.service_name].get()

    return serve


def test_every_setting_reaches_bentoml(bentoml_settings: Any) -> None:
    from bentoml._internal.configuration.containers import BentoMLContainer

    service, settings = bentoml_settings(
        BentoMLConfig(
            service_name="Qwen2.5-chat",
            workers=3,
            timeout=30,
            port=3100,
            enable_metrics=False,
            cpu_per_worker=2.5,
            memory_per_worker_mb=512,
            labels={"team": "ml"},
        )
    )
    assert settings["workers"] == 3
    assert settings["traffic"]["timeout"] == 35
    assert settings["resources"] == {"cpu": 7.5, "memory": "1536Mi"}
    assert settings["metrics"]["enabled"] is False
    assert BentoMLContainer.http.host.get() == "127.0.0.1"
    assert BentoMLContainer.http.port.get() == 3100
    assert BentoMLContainer.api_server_config.traffic.timeout.get() == 35
    assert service.labels == {"team": "ml"}
    assert [(env.name, env.value) for env in service.envs] == [("OPENBLAS_NUM_THREADS", "2")]


def test_the_defaults_reach_bentoml(bentoml_settings: Any) -> None:
    service, settings = bentoml_settings(BentoMLConfig())
    assert service.name == "mlops_service"
    assert settings["workers"] == 1
    assert settings["resources"] is None
    assert settings["metrics"]["enabled"] is True
    assert service.envs == []


@pytest.mark.parametrize(("host", "bound"), [("localhost", "127.0.0.1"), ("::1", "::1")])
def test_bentoml_takes_every_host_that_is_allowed(
    bentoml_settings: Any, host: str, bound: str
) -> None:
    _, settings = bentoml_settings(BentoMLConfig(host=host))
    assert settings["http"]["host"] == bound


@pytest.mark.parametrize("name", ["a", "1", "1.5", "a.0.b", "My-Service_2", "x" * 63])
def test_bentoml_takes_every_name_that_is_allowed(bentoml_settings: Any, name: str) -> None:
    _, settings = bentoml_settings(BentoMLConfig(service_name=name, workers=3))
    assert settings["workers"] == 3


def test_names_that_bentoml_would_mistake_for_settings_are_refused() -> None:
    from bentoml._internal.configuration.v2 import SCHEMA

    settings = {getattr(key, "schema", key) for key in SCHEMA.schema["services"]} - {str}
    assert "http" in settings
    for name in settings:
        with pytest.raises(ConfigError, match="service_name"):
            BentoMLConfig(service_name=name)


def test_the_guides_hybrid_configuration() -> None:
    config = BentoMLConfig(
        service_name="my_service",
        serving_backend=ServingBackend.HYBRID,
        ray_serve_enabled=True,
        ray_address="auto",
    )
    assert config.uses_ray
    assert config.to_ray_serve_config() == {
        "name": "my_service",
        "max_ongoing_requests": 64,
        "max_queued_requests": 256,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
        "health_check_period_s": 2,
        "health_check_timeout_s": 30,
        "graceful_shutdown_timeout_s": 300,
        "graceful_shutdown_wait_loop_s": 1,
        "max_constructor_retry_count": 2,
        "max_surge_percent": 25,
        "ray_actor_options": {"num_cpus": 1},
        "autoscaling_config": {
            "min_replicas": 1,
            "initial_replicas": 1,
            "max_replicas": 4,
            "target_ongoing_requests": 32,
            "upscale_delay_s": 2,
            "downscale_delay_s": 300,
            "metrics_interval_s": 0.5,
            "look_back_period_s": 2,
        },
    }


def test_ray_resources_and_replicas() -> None:
    config = BentoMLConfig(
        serving_backend="ray_serve",
        workers=6,
        cpu_per_worker=0.5,
        memory_per_worker_mb=512,
        ray_deployment_name="adapters",
    )
    told = config.to_ray_serve_config()
    assert (told["name"], told["num_replicas"]) == ("adapters", 6)
    assert told["ray_actor_options"] == {"num_cpus": 0.5, "memory": 512 * 2**20}
    config.ray_min_replicas, config.ray_max_replicas = 2, 3
    told = config.to_ray_serve_config()
    assert "num_replicas" not in told
    assert told["autoscaling_config"]["min_replicas"] == 2
    assert told["autoscaling_config"]["max_replicas"] == 3


def test_ray_options_reach_ray() -> None:
    config = BentoMLConfig(
        serving_backend="ray_serve",
        max_batch_size=8,
        timeout=60,
        ray=RayOptions(
            target_ongoing_requests=5,
            upscale_delay_s=0,
            downscale_delay_s=20,
            num_gpus=0.5,
            resources={"accelerator": 2},
            max_surge_percent=0,
        ),
    )
    told = config.to_ray_serve_config()
    assert (told["max_ongoing_requests"], told["max_queued_requests"]) == (16, 64)
    assert told["graceful_shutdown_timeout_s"] == 60
    assert told["max_surge_percent"] == 0
    assert told["ray_actor_options"] == {
        "num_cpus": 1,
        "num_gpus": 0.5,
        "resources": {"accelerator": 2},
    }
    scaling = told["autoscaling_config"]
    assert scaling["target_ongoing_requests"] == 5
    assert (scaling["upscale_delay_s"], scaling["downscale_delay_s"]) == (0, 20)
    assert scaling["look_back_period_s"] > scaling["metrics_interval_s"]  # Ray will refuse less
    config.ray.num_gpus = 0
    config.ray.resources.clear()
    assert config.to_ray_serve_config()["ray_actor_options"] == {"num_cpus": 1}


@pytest.mark.parametrize(
    ("fields", "replicas"),
    [
        ({}, (1, 4)),
        ({"workers": 2}, (2, 4)),
        ({"workers": 6}, (6, 6)),
        ({"workers": 2, "ray_min_replicas": 1, "ray_max_replicas": 1}, (1, 1)),
        ({"ray_min_replicas": 8}, (8, 8)),
        ({"ray_max_replicas": 9}, (1, 9)),
    ],
)
def test_how_many_replicas_there_are(fields: dict[str, int], replicas: tuple[int, int]) -> None:
    config = BentoMLConfig(serving_backend="hybrid", **fields)  # type: ignore[arg-type]
    low, high = config.ray_replicas
    assert (low, high) == replicas
    if low == high:
        assert config.ray_scaling() == {"num_replicas": low}
    else:
        scaling = config.ray_scaling()["autoscaling_config"]
        assert (scaling["min_replicas"], scaling["max_replicas"]) == replicas
        assert scaling["initial_replicas"] == low


def test_ray_is_asked_for_by_backend_or_flag() -> None:
    assert not BentoMLConfig().uses_ray
    assert BentoMLConfig(ray_serve_enabled=True).effective_backend is ServingBackend.HYBRID
    assert BentoMLConfig(serving_backend="ray_serve").effective_backend is ServingBackend.RAY_SERVE
    with pytest.raises(ConfigError, match="use 'hybrid' or 'ray_serve'"):
        BentoMLConfig().to_ray_serve_config()
