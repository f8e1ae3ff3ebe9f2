"""Every field says what it may hold, when it is made, assigned and used."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops.errors import ConfigError
from mlops.serving.bentoml.config import (
    AppleSiliconOptimization,
    BentoMLConfig,
    ModelFramework,
    ServingBackend,
)
from mlops.serving.bentoml.http_options import HTTPOptions, LogFormat
from mlops.serving.bentoml.ray_options import RayOptions

LINE = "a" * 255
NOT_TEXT = [1, b"a", ["a"], ""]
NOT_A_FLAG = [1, 0, "true", None]

GOOD: dict[str, list[Any]] = {
    "service_name": ["my_service", "qwen2.5", "A", "x" * 63],
    "project_name": ["lora-finetuning-mlx", "two words", "Öl"],
    "model_path": [None, "outputs/checkpoints/checkpoint_epoch_2", "name:1.0.0"],
    "model_name": [None, "adapter"],
    "model_version": [None, "1.0.0"],
    "model_framework": list(ModelFramework),
    "serving_backend": list(ServingBackend),
    "workers": [1, 2, 256],
    "max_batch_size": [1, 32, 1024],
    "max_latency_ms": [0, 10, 1000],
    "max_resident_adapters": [None, 1, 1_000_000],
    "timeout": [1, 0.5, 86_400],
    "stuck_after_s": [0.5, 60, 86_400],
    "host": ["127.0.0.1", "0.0.0.0", "::1", "localhost"],  # noqa: S104
    "port": [1, 3000, 65_535],
    "enable_swagger": [True, False],
    "enable_metrics": [True, False],
    "cpu_per_worker": [None, 1, 0.5],
    "memory_per_worker_mb": [None, 1, 4096],
    "enable_apple_silicon_optimization": [True, False],
    "apple_silicon": [AppleSiliconOptimization(enable_ane=True)],
    "http": [HTTPOptions(requests_per_minute=60)],
    "ray_serve_enabled": [True, False],
    "ray_address": [None, "auto", "local", "10.0.0.1:6379", "ray://head.local:10001", "[::1]:6379"],
    "ray_deployment_name": [None, "adapters"],
    "ray_min_replicas": [None, 1, 4],
    "ray_max_replicas": [None, 1, 1000],
    "ray": [RayOptions(num_gpus=0.5, resources={"accelerator": 1})],
    "labels": [{}, {"env": "production", "note": ""}],
}

BAD: dict[str, list[Any]] = {
    "service_name": [
        *NOT_TEXT,
        *(None, "x" * 64, "a b", "-a", "a/b", 'a"', "a\n", "ä", "http", "workers"),
    ],
    "project_name": [*NOT_TEXT, None, "a\nb", "a\x00", LINE + "a"],
    "model_path": [1, "", "a\nb", "a\x1b", "a" * 4097],
    "model_name": [*NOT_TEXT, "a\nb"],
    "model_version": [*NOT_TEXT, 1.0, "1\n"],
    "model_framework": ["keras", "MLX", None, 1, ["mlx"]],
    "serving_backend": ["ray", None, 1],
    "workers": [0, -1, 257, 1.0, True, "2", None],
    "max_batch_size": [0, 1025, True, "32", 1.5],
    "max_latency_ms": [-1, 600_001, 0.5, False],
    "max_resident_adapters": [0, -1, 1_000_001, 1.0, True, "8"],
    "timeout": [0, -1, float("nan"), float("inf"), 86_401, True, "300", None],
    "stuck_after_s": [0, -1, float("nan"), 86_401, True, None, "60"],
    "host": ["", "example.org", "1.2.3", "127.0.0.1:3000", "::1%a\n", None, 1],
    "port": [0, 65_536, "3000", True],
    "enable_swagger": NOT_A_FLAG,
    "enable_metrics": NOT_A_FLAG,
    "cpu_per_worker": [0, -1, float("nan"), True, "2"],
    "memory_per_worker_mb": [0, 0.5, True, "512Mi"],
    "enable_apple_silicon_optimization": NOT_A_FLAG,
    "apple_silicon": [1, "M3", ["enable_ane"]],
    "http": [1, "open", ["log_prompts"]],
    "ray_serve_enabled": NOT_A_FLAG,
    "ray_address": ["", "head", "head:0", "head:99999", "http://head:1", "head:1\n", 6379],
    "ray_deployment_name": ["", "a#b", "a/b", 1],
    "ray_min_replicas": [0, True, "2"],
    "ray_max_replicas": [0, 1001, 2.0],
    "ray": [1, "auto", ["num_gpus"]],
    "labels": [None, [], {"a": 1}, {1: "a"}, {"a": "b\n"}, {"": "a"}],
}

APPLE_BAD: dict[str, list[Any]] = {
    "enable_mps": NOT_A_FLAG,
    "enable_mlx": NOT_A_FLAG,
    "enable_unified_memory": NOT_A_FLAG,
    "enable_ane": NOT_A_FLAG,
    "thermal_aware": NOT_A_FLAG,
    "max_batch_size": [0, 1025, True, None],
    "chip_type": ["", "apple", "M", "M3\n", 3],
}

HTTP_GOOD: dict[str, list[Any]] = {
    "max_body_bytes": [1024, 1 << 30],
    "max_prompt_tokens": [None, 1, 100_000],
    "api_key_file": [None, "/run/secrets/keys"],
    "requests_per_minute": [None, 1, 1_000_000],
    "max_concurrent_requests": [None, 1, 100_000],
    "cors_origins": [(), ("https://example.com", "http://localhost:5173"), ("*",)],
    "allowed_hosts": [(), ("models.example.com", "*.example.com", "10.0.0.7"), ("::1", "*")],
    "log_requests": [True, False],
    "log_prompts": [True, False],
    "log_format": list(LogFormat),
    "enable_runtime_adapters": [True, False],
    "adapter_folder": [None, "/srv/adapters"],
    "shutdown_delay": [0, 5, 0.5],
    "shutdown_timeout": [0, 30, 86_400],
}

HTTP_BAD: dict[str, list[Any]] = {
    "max_body_bytes": [0, 1023, 1.5, True, None, "4M"],
    "max_prompt_tokens": [0, True, 1.5],
    "api_key_file": ["", 1, "a\nb"],
    "requests_per_minute": [0, -1, True, 1_000_001],
    "max_concurrent_requests": [0, True, "2"],
    "cors_origins": ["*", None, ["example.com"], ["https://a.b/path"], ["null"], [1], ["*"] * 101],
    "allowed_hosts": ["a.b", None, ["a.b:80"], ["http://a.b"], ["a..b"], ["*b"], [""], ["[::1]"]],
    "log_requests": NOT_A_FLAG,
    "log_prompts": NOT_A_FLAG,
    "log_format": ["xml", None, 1],
    "enable_runtime_adapters": NOT_A_FLAG,
    "adapter_folder": ["", 1, "a\nb"],
    "shutdown_delay": [-1, 3601, float("nan"), True, None, "1"],
    "shutdown_timeout": [-0.1, 86_401, float("inf"), None],
}

RAY_GOOD: dict[str, list[Any]] = {
    "route_prefix": [None, "/", "/chat", "/team-a/chat.v2", "/~me"],
    "target_ongoing_requests": [None, 1, 0.5, 100_000],
    "upscale_delay_s": [0, 2, 0.5, 86_400],
    "downscale_delay_s": [0, 300, 0.5, 86_400],
    "num_gpus": [None, 0, 0.25, 8],
    "resources": [{}, {"accelerator": 0.5, "node:10.0.0.1": 2}],
    "model_source": [None, "/mnt/models", "s3://bucket/models"],
    "adapter_affinity": [True, False],
    "max_surge_percent": [0, 25, 100],
}

RAY_BAD: dict[str, list[Any]] = {
    "route_prefix": [
        *NOT_TEXT,
        *("chat", "/chat/", "//", "/a//b", "/a b", "/..", "/a/../b", "/a?b", "/{id}", "/ä", "/a\n"),
        *("/-/healthz", "/" + LINE),
    ],
    "target_ongoing_requests": [0, -1, float("nan"), 100_001, True, "8"],
    "upscale_delay_s": [-1, float("inf"), 86_401, True, None, "2"],
    "downscale_delay_s": [-0.1, float("nan"), 86_401, False, None, "300"],
    "num_gpus": [-1, 65, float("nan"), True, "1"],
    "resources": [
        *(None, [], {"a": 0}, {"a": -1}, {"a": "1"}, {"a": True}, {"a": float("inf")}),
        *({1: 1}, {"": 1}, {"a\n": 1}, {f"r{number}": 1 for number in range(101)}),
    ],
    "model_source": [*NOT_TEXT, "a\nb", "/" + "a" * 4096],
    "adapter_affinity": NOT_A_FLAG,
    "max_surge_percent": [-1, 101, 0.5, True, None, "25"],
}


def pairs(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in table.items() for value in values]


def test_every_field_has_examples_here() -> None:
    names = {field.name for field in fields(BentoMLConfig)}
    assert names == set(GOOD) == set(BAD)
    assert {field.name for field in fields(AppleSiliconOptimization)} == set(APPLE_BAD)
    assert {field.name for field in fields(HTTPOptions)} == set(HTTP_GOOD) == set(HTTP_BAD)
    assert {field.name for field in fields(RayOptions)} == set(RAY_GOOD) == set(RAY_BAD)


@pytest.mark.parametrize(("name", "value"), pairs(GOOD))
def test_good_values_are_kept(name: str, value: Any) -> None:
    assert getattr(BentoMLConfig(**{name: value}), name) == value
    config = BentoMLConfig()
    setattr(config, name, value)
    config.validate()
    assert getattr(config, name) == value


@pytest.mark.parametrize(("name", "value"), pairs(BAD))
def test_bad_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        BentoMLConfig(**{name: value})
    config = BentoMLConfig()
    before = getattr(config, name)
    with pytest.raises(ConfigError, match=name):
        setattr(config, name, value)
    assert getattr(config, name) == before


@pytest.mark.parametrize(("name", "value"), pairs(APPLE_BAD))
def test_bad_apple_silicon_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        AppleSiliconOptimization(**{name: value})
    with pytest.raises(ConfigError, match=name):
        BentoMLConfig(apple_silicon={name: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=name):
        setattr(BentoMLConfig().apple_silicon, name, value)


@pytest.mark.parametrize(("name", "value"), pairs(HTTP_GOOD))
def test_good_http_options_are_kept_through_a_file(name: str, value: Any) -> None:
    config = BentoMLConfig(http=HTTPOptions(**{name: value}))
    assert getattr(config.http, name) == value
    written = json.loads(json.dumps(config.to_dict()))
    assert BentoMLConfig.from_dict(written).http == config.http


@pytest.mark.parametrize(("name", "value"), pairs(HTTP_BAD))
def test_bad_http_options_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        HTTPOptions(**{name: value})
    with pytest.raises(ConfigError, match=name):
        BentoMLConfig(http={name: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=name):
        setattr(BentoMLConfig().http, name, value)


@pytest.mark.parametrize(("name", "value"), pairs(RAY_GOOD))
def test_good_ray_options_are_kept_through_a_file(name: str, value: Any) -> None:
    config = BentoMLConfig(ray=RayOptions(**{name: value}))
    assert getattr(config.ray, name) == value
    written = json.loads(json.dumps(config.to_dict()))
    assert BentoMLConfig.from_dict(written).ray == config.ray


@pytest.mark.parametrize(("name", "value"), pairs(RAY_BAD))
def test_bad_ray_options_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        RayOptions(**{name: value})
    with pytest.raises(ConfigError, match=name):
        BentoMLConfig(ray={name: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=name):
        setattr(BentoMLConfig().ray, name, value)


@pytest.mark.parametrize("name", ["CPU", "GPU", "memory", "object_store_memory"])
def test_what_ray_has_options_of_its_own_for_is_no_further_resource(name: str) -> None:
    with pytest.raises(ConfigError, match="resources"):
        RayOptions(resources={name: 1})


def test_resources_changed_in_place_are_checked_when_used() -> None:
    config = BentoMLConfig(serving_backend="ray_serve")
    config.ray.resources["accelerator"] = -1
    for use in (config.validate, config.to_ray_serve_config):
        with pytest.raises(ConfigError, match="resources"):
            use()


def test_runtime_adapters_need_one_worker() -> None:
    config = BentoMLConfig(workers=2)
    config.http.enable_runtime_adapters = True
    with pytest.raises(ConfigError, match="a request reaches one worker"):
        config.validate()


def test_an_error_names_field_value_and_what_is_allowed() -> None:
    with pytest.raises(ConfigError) as caught:
        BentoMLConfig(workers=0)
    assert str(caught.value) == (
        "BentoMLConfig.workers = 0 is not allowed; use a whole number from 1 to 256"
    )
    with pytest.raises(ConfigError, match=r"one of 'mlx', 'pytorch', 'transformers', 'onnx'"):
        BentoMLConfig(model_framework="keras")


def test_an_unknown_field_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"'worker' \(given as 2\); did you mean 'workers'"):
        BentoMLConfig(worker=2)  # type: ignore[call-arg]
    config = BentoMLConfig()
    with pytest.raises(ConfigError, match="did you mean 'max_batch_size'"):
        config.max_batchsize = 8  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="did you mean 'enable_ane'"):
        AppleSiliconOptimization(enable_an=True)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="fields are service_name, project_name"):
        BentoMLConfig(zzz=2)  # type: ignore[call-arg]


def test_an_error_stays_short_whatever_the_value() -> None:
    for value in ["x" * 10**6, [["y" * 1000] * 1000] * 1000, 1 << 100_000]:
        with pytest.raises(ConfigError) as caught:
            BentoMLConfig(workers=value)  # type: ignore[arg-type]
        assert len(str(caught.value)) < 1000


def test_names_of_enums_and_paths_may_be_text() -> None:
    config = BentoMLConfig(
        model_framework="onnx", serving_backend="hybrid", model_path=Path("models/a")
    )
    assert config.model_framework is ModelFramework.ONNX
    assert config.serving_backend is ServingBackend.HYBRID
    assert config.model_path == "models/a"


def test_the_default_apple_silicon_is_not_shared() -> None:
    first, second = BentoMLConfig(), BentoMLConfig(apple_silicon=None)  # type: ignore[arg-type]
    first.apple_silicon.enable_ane = True
    assert second.apple_silicon == AppleSiliconOptimization()


def test_labels_changed_in_place_are_checked_when_used() -> None:
    config = BentoMLConfig(labels={"team": "ml"})
    config.labels["team"] = "ml\nUSER root"
    for use in (config.validate, config.to_bentoml_config):
        with pytest.raises(ConfigError, match="labels"):
            use()


def test_fields_that_belong_together_may_be_assigned_in_any_order() -> None:
    config = BentoMLConfig()
    config.ray_min_replicas = 8
    config.ray_max_replicas = 16
    config.max_latency_ms = 400_000
    config.timeout = 600
    config.validate()


@pytest.mark.parametrize(
    "values",
    [
        {"ray_min_replicas": 3, "ray_max_replicas": 2},
        {"workers": 3, "ray_max_replicas": 2},
        {"max_latency_ms": 1000, "timeout": 1},
    ],
)
def test_contradictions_are_refused_when_made_and_when_used(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"ray_max_replicas|max_latency_ms"):
        BentoMLConfig(**values)
    config = BentoMLConfig()
    for name, value in values.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError, match=r"ray_max_replicas|max_latency_ms"):
        config.to_bentoml_config()


def test_a_configuration_can_be_copied_and_pickled() -> None:
    config = BentoMLConfig(workers=2, labels={"team": "ml"})
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config  # noqa: S301


@st.composite
def configurations(draw: st.DrawFn) -> BentoMLConfig:
    flag = st.booleans()
    line = st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=20)
    return BentoMLConfig(
        workers=draw(st.integers(1, 4)),
        timeout=draw(st.floats(601, 86_400) | st.integers(601, 86_400)),
        service_name=draw(st.from_regex(r"s-[-._a-z0-9]{0,20}[a-z0-9]", fullmatch=True)),
        model_framework=draw(st.sampled_from(ModelFramework)),
        serving_backend=draw(st.sampled_from(ServingBackend)),
        model_path=draw(st.none() | line),
        cpu_per_worker=draw(st.none() | st.floats(0.1, 1024)),
        labels=draw(st.dictionaries(line, line, max_size=4)),
        enable_swagger=draw(flag),
        max_resident_adapters=draw(st.none() | st.integers(1, 100)),
        http=HTTPOptions(
            requests_per_minute=draw(st.none() | st.integers(1, 1000)),
            cors_origins=draw(st.sampled_from([(), ("*",), ("https://a.example", "*")])),
            log_format=draw(st.sampled_from(LogFormat)),
        ),
        ray_serve_enabled=draw(flag),
        ray_max_replicas=draw(st.none() | st.integers(4, 8)),
        ray=RayOptions(
            num_gpus=draw(st.none() | st.sampled_from([0, 0.5, 1])),
            resources=draw(st.dictionaries(line, st.floats(0.001, 8), max_size=2)),
            adapter_affinity=draw(flag),
            max_surge_percent=draw(st.integers(0, 100)),
        ),
        apple_silicon=AppleSiliconOptimization(
            enable_ane=draw(flag),
            enable_mps=draw(flag),
            enable_mlx=draw(flag),
            chip_type=draw(st.none() | st.sampled_from(["M1", "M4"])),
        ),
    )


@given(configurations())
def test_to_dict_and_from_dict_are_inverse(config: BentoMLConfig) -> None:
    values = json.loads(json.dumps(config.to_dict()))
    assert BentoMLConfig.from_dict(values) == config


@given(configurations())
def test_changes_make_the_same_configuration_from_the_defaults(config: BentoMLConfig) -> None:
    changes = json.loads(json.dumps(config.changes()))
    assert BentoMLConfig.from_dict(changes) == config
    assert BentoMLConfig().with_changes(changes) == config
    assert config.with_changes({}) == config.with_changes(changes) == config


@given(configurations(), configurations())
def test_what_one_changes_stands_above_the_other_and_the_rest_stays(
    below: BentoMLConfig, above: BentoMLConfig
) -> None:
    both = below.with_changes(above.changes()).to_dict()
    changed, kept = above.changes(), below.to_dict()
    for name, value in both.items():
        if name in {"apple_silicon", "http", "ray"}:
            assert value == {**kept[name], **changed.get(name, {})}
        else:
            assert value == changed.get(name, kept[name])


def test_changes_say_nothing_of_defaults() -> None:
    assert BentoMLConfig().changes() == {}
    config = BentoMLConfig(workers=2, labels={"team": "ml"}, ray=RayOptions(num_gpus=0))
    config.http.log_prompts = True
    assert config.changes() == {
        "workers": 2,
        "labels": {"team": "ml"},
        "http": {"log_prompts": True},
        "ray": {"num_gpus": 0},
    }


def test_with_changes_leaves_the_first_as_it_was() -> None:
    first = BentoMLConfig(http=HTTPOptions(log_prompts=True))
    second = first.with_changes({"timeout": 20, "http": {"requests_per_minute": 6}})
    assert first == BentoMLConfig(http=HTTPOptions(log_prompts=True))
    assert (second.timeout, second.http) == (
        20,
        HTTPOptions(log_prompts=True, requests_per_minute=6),
    )


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"worker": 2}, "did you mean 'workers'"),
        ({"ray": {"gpus": 1}}, "gpus"),
        ({"http": {"requests_per_minute": 0}}, "requests_per_minute"),
        ({"ray_max_replicas": 1}, "ray_max_replicas"),
        ({"timeout": 0.005}, "max_latency_ms"),
    ],
)
def test_changes_that_cannot_be_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        BentoMLConfig(workers=2).with_changes(values)
