from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from mlops.errors import ConfigError, IntegrityError
from mlops.hardware import detect
from mlops.serving.bentoml import served_model
from mlops.serving.bentoml.config import AppleSiliconOptimization, BentoMLConfig
from mlops.serving.bentoml.packager import package_model
from mlops.serving.bentoml.runner import MLXModelRunner
from mlops.serving.bentoml.service import (
    BentoMLError,
    create_bentoml_service,
    create_lora_service,
)
from mlops.serving.http import RunnerHost
from mlops.serving.runner.base import Runner
from tiny_models import write_language_model, write_lora_adapter

pytestmark = [
    pytest.mark.usefixtures("bentoml_home"),
    # BentoML's own request handling
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

LONG_S = 60.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return write_lora_adapter(base.parent / "formal", base, scale=40.0, base_reference=str(base))


@pytest.fixture
def serving() -> Iterator[Callable[..., TestClient]]:
    """Serves a service in this process, once its model is loaded."""
    clients: list[TestClient] = []

    def serve(service: Any) -> TestClient:
        _forget_metrics()
        client = TestClient(service.to_asgi(), raise_server_exceptions=False)
        client.__enter__()
        clients.append(client)
        give_up = time.monotonic() + LONG_S
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < give_up, client.get("/health").text
            time.sleep(0.01)
        return client

    yield serve
    for client in clients:
        client.__exit__(None, None, None)


def _forget_metrics() -> None:
    """BentoML registers a service's metrics once a process; these tests have many services."""
    from prometheus_client import REGISTRY

    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith("bentoml_service"):
            REGISTRY.unregister(collector)


class CountingRunner:
    """A runner that owes nothing to MLXModelRunner."""

    def __init__(self, model_path: str) -> None:
        self.model_path = model_path
        self.is_loaded = False

    def load_model(self) -> None:
        self.is_loaded = True

    def predict(self, input_data: Any) -> dict[str, Any]:
        return {"prediction": len(input_data), "mlx_optimized": False, "model_type": "count"}

    def predict_batch(self, inputs: Any) -> list[Any]:
        return [self.predict(fields) for fields in inputs]

    def get_memory_usage(self) -> dict[str, Any]:
        return {"total_mb": 0.5, "mlx_available": False}

    def unload_model(self) -> None:
        self.is_loaded = False


class CustomModelRunner(MLXModelRunner):
    """The guide's custom runner."""

    def _load_mlx_model(self) -> Any:
        import mlx.core as mx

        return mx.array([2.0])

    def _mlx_predict(self, input_data: Any) -> Any:
        return self.model * float(input_data["input"])


def test_a_language_model(serving: Callable[..., TestClient], base: Path) -> None:
    service = create_bentoml_service(base, service_name="tiny", project_name="tests")
    client = serving(service)
    answer = client.post(
        "/predict", json={"text": "Explain", "max_tokens": 4, "temperature": 0.7}
    ).json()
    assert (
        answer.items()
        >= {
            "mlx_optimized": True,
            "model_type": "mlx",
            "service_name": "tiny",
            "project_name": "tests",
        }.items()
    )
    assert isinstance(answer["prediction"], str)
    assert answer["usage"]["completion_tokens"] <= 4
    health = client.get("/health").json()
    assert health["status"] == "healthy"
    assert health["memory_usage_mb"] > 0
    assert health["architecture"] == "llama"
    assert health["hardware"]["blas"]
    metrics = client.get("/metrics").json()
    assert metrics["memory_usage"]["total_mb"] > 0


@pytest.mark.parametrize(
    ("fields", "status", "field"),
    [
        ({"text": "a", "max_token": 5}, 422, "max_token"),
        ({"text": "a", "temperature": -1}, 422, "temperature"),
        ({"text": "a", "max_tokens": "many"}, 422, "max_tokens"),
        ({"text": ""}, 422, "text"),
        ({"text": "a", "adapter": "unknown"}, 404, None),
    ],
)
def test_a_bad_request_names_its_field(
    serving: Callable[..., TestClient],
    base: Path,
    fields: dict[str, Any],
    status: int,
    field: str | None,
) -> None:
    response = serving(create_bentoml_service(base)).post("/predict", json=fields)
    assert response.status_code == status
    assert response.json()["error"].get("field") == field


def test_an_adapter_and_its_base(
    serving: Callable[..., TestClient], base: Path, adapter: Path
) -> None:
    other = write_lora_adapter(base.parent / "loud", base, scale=60.0, seed=9)
    service = create_lora_service(
        model_path=adapter,
        service_name="my_lora_service",
        project_name="lora-finetuning-mlx",
        adapters={"loud": other},
    )
    client = serving(service)

    def ask(**fields: Any) -> dict[str, Any]:
        answer: dict[str, Any] = client.post(
            "/predict", json={"text": "Explain", "max_tokens": 12, "temperature": 0, **fields}
        ).json()
        return answer

    assert ask()["model_type"] == "lora"
    assert ask()["adapter"] == "formal"
    assert len({ask(adapter=name)["prediction"] for name in ("base", "formal", "loud")}) == 3


def test_what_the_files_are_is_seen(serving: Callable[..., TestClient], adapter: Path) -> None:
    client = serving(create_bentoml_service(adapter, service_name="seen"))
    assert client.get("/health").json()["model_type"] == "lora"


def test_a_stored_model_by_tag_and_digest(
    serving: Callable[..., TestClient], base: Path, bentoml_home: Path
) -> None:
    result = package_model(
        model_path=str(base), model_name="stored", model_version="1.0.0", build_bento=False
    )
    service = create_bentoml_service("stored:1.0.0", digest=result["model_digest"])
    health = serving(service).get("/health").json()
    assert health["model_tag"] == "stored:1.0.0"
    assert health["digest"] == result["model_digest"]
    weights = next((bentoml_home / "models" / "stored" / "1.0.0").rglob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(content)
    damaged = create_bentoml_service("stored:1.0.0", service_name="damaged")
    _forget_metrics()
    client = TestClient(damaged.to_asgi())
    with client:
        give_up = time.monotonic() + LONG_S
        while client.get("/health").json()["status"] == "loading":
            assert time.monotonic() < give_up
            time.sleep(0.01)
        assert client.get("/health").json()["error"]["type"] == IntegrityError.__name__
        assert client.get("/livez").status_code == 200
        assert client.get("/readyz").status_code == 503


def test_the_guides_custom_runner(serving: Callable[..., TestClient], tmp_path: Path) -> None:
    weights = tmp_path / "model.bin"
    weights.write_bytes(b"any format")
    service = create_bentoml_service(weights, model_type="custom", runner_class=CustomModelRunner)
    answer = serving(service).post("/predict", json={"input": "21", "anything": [1]}).json()
    assert answer["prediction"] == [42.0]
    assert answer["model_type"] == "custom"


def test_a_runner_of_ones_own(serving: Callable[..., TestClient], tmp_path: Path) -> None:
    assert isinstance(CountingRunner("x"), Runner)
    client = serving(create_bentoml_service(tmp_path, runner_class=CountingRunner))
    assert client.post("/predict", json={"a": 1, "b": 2}).json()["prediction"] == 2


def test_a_users_middleware_stands_in_front(
    serving: Callable[..., TestClient], tmp_path: Path
) -> None:
    class Guard:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            from starlette.responses import PlainTextResponse

            if scope["type"] == "http" and scope["path"] == "/predict":
                await PlainTextResponse("who are you?", 401)(scope, receive, send)
            else:
                await self.app(scope, receive, send)

    service = create_bentoml_service(tmp_path, runner_class=CountingRunner)
    service.add_asgi_middleware(Guard)
    assert serving(service).post("/predict", json={}).status_code == 401


def test_swagger_and_metrics_can_be_turned_off(
    serving: Callable[..., TestClient], tmp_path: Path
) -> None:
    def serve(**settings: Any) -> TestClient:
        config = BentoMLConfig(**settings)
        return serving(create_bentoml_service(tmp_path, runner_class=CountingRunner, config=config))

    shown = serve(service_name="shown")
    assert shown.get("/").status_code == 200
    assert "/predict" in shown.get("/docs.json").json()["paths"]
    hidden = serve(service_name="hidden", enable_swagger=False, enable_metrics=False)
    assert [hidden.get(path).status_code for path in ("/", "/docs.json", "/metrics")] == [404] * 3
    assert hidden.post("/predict", json={}).status_code == 200


def test_the_timeout_of_the_config(serving: Callable[..., TestClient], tmp_path: Path) -> None:
    class SlowRunner(CountingRunner):
        def predict_batch(self, inputs: Any) -> list[Any]:
            time.sleep(0.5)
            return super().predict_batch(inputs)

    config = BentoMLConfig(timeout=0.1)
    client = serving(create_bentoml_service(tmp_path, runner_class=SlowRunner, config=config))
    assert client.post("/predict", json={}).status_code == 504


def test_a_hot_machine_gets_smaller_batches(
    serving: Callable[..., TestClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlops.hardware.thermal_state", lambda: "critical")
    config = BentoMLConfig(max_batch_size=8, max_latency_ms=200)
    client = serving(create_bentoml_service(tmp_path, runner_class=CountingRunner, config=config))
    with ThreadPoolExecutor(3) as threads:
        for _ in range(3):
            threads.submit(client.post, "/predict", json={})
    assert client.get("/metrics").json()["batches_by_size"] == {"1": 3}


def test_settings_come_from_the_environment_a_mapping_and_arguments(
    serving: Callable[..., TestClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLOPS_WORKERS", "3")
    service = create_bentoml_service(
        tmp_path,
        service_name="argument",
        runner_class=CountingRunner,
        config={"service_name": "mapping", "project_name": "mapping", "workers": 2},
    )
    assert service.name == "argument"
    assert service.config["workers"] == 3
    assert serving(service).get("/health").json()["project_name"] == "mapping"
    config = BentoMLConfig(workers=2)
    own = create_bentoml_service(tmp_path, runner_class=CountingRunner, config=config)
    assert own.config["workers"] == 2


def test_bentoml_finds_the_service_in_the_users_module(tmp_path: Path) -> None:
    module = sys.modules[__name__]
    module.svc = create_bentoml_service(  # type: ignore[attr-defined]
        tmp_path, runner_class=CountingRunner
    )
    assert module.svc.import_string == f"{__name__}:svc"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model_path": "no/such/folder"}, "does not exist"),
        ({"model_path": "no-such-tag:1.0.0"}, "no-such-tag"),
        ({"model_type": "gguf"}, "gguf"),
        ({"model_type": "custom"}, "runner_class"),
        ({"runner_class": dict}, "load_model"),
        ({"runner_class": CountingRunner, "digest": "sha256:0"}, "digest"),
        ({"runner_class": CountingRunner, "adapters": {"a": "b"}}, "adapters"),
    ],
)
def test_mistakes_are_told_when_the_service_is_made(
    tmp_path: Path, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(BentoMLError, match=words) as told:
        create_bentoml_service(**{"model_path": tmp_path, **arguments})
    assert told.value.operation == "create_service"


@pytest.mark.parametrize(
    "arguments",
    [
        {"service_name": "my service\n"},
        {"config": {"max_batch_sizes": 2}},
        {"config": 5},
        {"config": BentoMLConfig(apple_silicon=AppleSiliconOptimization(enable_mlx=False))},
    ],
)
def test_bad_settings(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        create_bentoml_service(tmp_path, **arguments)


def test_the_config_can_name_the_model(
    serving: Callable[..., TestClient], base: Path, bentoml_home: Path
) -> None:
    stored = package_model(base, "named", model_version="1.0.0", build_bento=False)
    by_name = BentoMLConfig(model_name="named", model_version="1.0.0")
    client = serving(create_bentoml_service(config=by_name))
    while client.get("/health").json()["status"] == "loading":
        time.sleep(0.01)
    assert client.get("/health").json()["digest"] == stored["model_digest"]
    reference = f"{stored['model_tag']}@{stored['model_digest']}"
    assert create_bentoml_service(reference).name == "mlops_service"
    by_path = create_bentoml_service(config=BentoMLConfig(model_path=str(base)))
    assert by_path.name == "mlops_service"
    with pytest.raises(BentoMLError, match="no model is named"):
        create_bentoml_service()


def test_a_nested_setting_of_a_mapping_gives_way_to_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLOPS_APPLE_SILICON__ENABLE_MLX", "true")
    mapping = {"apple_silicon": {"enable_mlx": False}}
    write_language_model(tmp_path / "model")
    assert create_bentoml_service(tmp_path / "model", config=mapping).name == "mlops_service"


@pytest.mark.parametrize("framework", ["onnx", "coreml", "pytorch"])
def test_a_framework_without_a_runner_is_refused(base: Path, framework: str) -> None:
    config = BentoMLConfig(model_framework=framework)
    with pytest.raises(BentoMLError, match=f"model_framework is '{framework}'"):
        create_bentoml_service(base, config=config)
    assert create_bentoml_service(base, runner_class=CountingRunner, config=config).name


def test_workers_share_the_memory(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def budget(**settings: Any) -> int:
        config = BentoMLConfig(**settings)
        hosts: list[RunnerHost] = []
        monkeypatch.setattr(served_model, "RunnerHost", recording(hosts))
        create_bentoml_service(base, config=config)
        return int(hosts[0]._make_runner().memory_budget_bytes)  # type: ignore[attr-defined]

    assert budget(memory_per_worker_mb=5, workers=2) == 5 * 2**20
    assert budget(workers=4) == pytest.approx(budget(workers=1) / 4, abs=1)
    monkeypatch.setenv("MLOPS_SUPERVISOR_WORKERS", "2")
    assert budget(workers=4) == pytest.approx(detect().memory_bytes * 0.6 / 2, abs=1)


def recording(hosts: list[RunnerHost]) -> Callable[..., RunnerHost]:
    def make(*arguments: Any, **settings: Any) -> RunnerHost:
        hosts.append(RunnerHost(*arguments, **settings))
        return hosts[-1]

    return make


def test_the_batch_limit_of_an_apple_chip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = BentoMLConfig(apple_silicon=AppleSiliconOptimization(max_batch_size=4))
    here = replace(detect(), chip_type=None)
    assert served_model.settings_of(config, None, None).batch_limit("nominal") == 32
    assert any("apple_silicon.max_batch_size" in note for note in config.describe_unhonoured(here))
    monkeypatch.setattr("mlops.hardware.detect", lambda: replace(here, chip_type="M3"))
    assert served_model.settings_of(config, None, None).batch_limit("nominal") == 4
    assert served_model.settings_of(config.to_dict(), None, None).batch_limit("nominal") == 4
    assert config.apple_silicon.chip_type is None
