"""Arguments win over the environment, the environment over a file, a file over the defaults."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlops.errors import ConfigError
from mlops.serving.bentoml.config import AppleSiliconOptimization, BentoMLConfig, ModelFramework
from mlops.serving.bentoml.http_options import HTTPOptions
from mlops.serving.bentoml.ray_options import RayOptions

GUIDE_BENTOFILE = """
runner:
  batching:
    enabled: true
    max_batch_size: 32
    max_latency_ms: 1000
"""


def write(folder: Path, name: str, content: str) -> Path:
    file = folder / name
    file.write_text(content, encoding="utf-8")
    return file


def test_precedence(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "service.yaml",
        "workers: 2\nport: 3001\ntimeout: 20\n"
        "apple_silicon: {enable_ane: true, max_batch_size: 8, thermal_aware: false}\n",
    )
    environ = {
        "MLOPS_WORKERS": "3",
        "MLOPS_PORT": "3002",
        "MLOPS_APPLE_SILICON__MAX_BATCH_SIZE": "9",
        "MLOPS_APPLE_SILICON__THERMAL_AWARE": "true",
    }
    config = BentoMLConfig.load(file, environ, workers=4, apple_silicon={"max_batch_size": 10})
    assert (config.workers, config.port, config.timeout, config.max_batch_size) == (4, 3002, 20, 32)
    assert config.apple_silicon == AppleSiliconOptimization(
        enable_ane=True, thermal_aware=True, max_batch_size=10
    )


def test_a_table_stands_where_a_file_does() -> None:
    table = BentoMLConfig(workers=2, port=3001).to_dict()
    table["http"]["log_prompts"] = True
    environ = {
        "MLOPS_WORKERS": "3",
        "MLOPS_APPLE_SILICON__ENABLE_ANE": "true",
        "MLOPS_HTTP__CORS_ORIGINS": "https://a.example, https://b.example",
    }
    config = BentoMLConfig.load(table, environ, timeout=20)
    assert config.http == HTTPOptions(
        log_prompts=True, cors_origins=("https://a.example", "https://b.example")
    )
    assert (config.workers, config.port, config.timeout) == (3, 3001, 20)
    assert config.apple_silicon.enable_ane


def test_ray_options_are_layered_field_by_field(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "service.toml",
        "[ray]\nnum_gpus = 1\nroute_prefix = '/a'\nresources = {a = 1}\nupscale_delay_s = 5\n",
    )
    environ = {"MLOPS_RAY__ROUTE_PREFIX": "/b", "MLOPS_RAY__RESOURCES": "b=2"}
    config = BentoMLConfig.load(file, environ, ray={"upscale_delay_s": 6})
    assert config.ray == RayOptions(
        num_gpus=1, route_prefix="/b", resources={"b": 2}, upscale_delay_s=6
    )
    whole = BentoMLConfig.load(file, environ, ray=RayOptions(num_gpus=0))
    assert whole.ray == RayOptions(num_gpus=0)


def test_the_environment_is_read_by_load_and_from_file_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLOPS_WORKERS", "3")
    file = write(tmp_path, "service.toml", "port = 3001")
    assert BentoMLConfig().workers == 1
    assert BentoMLConfig.from_dict({}).workers == 1
    assert BentoMLConfig.load().workers == 3
    assert BentoMLConfig.from_file(file).workers == 3
    assert BentoMLConfig.from_file(file, environ={}).workers == 1


@pytest.mark.parametrize(
    ("variable", "written", "field", "value"),
    [
        ("MLOPS_WORKERS", "2", "workers", 2),
        ("MLOPS_TIMEOUT", "2.5", "timeout", 2.5),
        ("MLOPS_ENABLE_METRICS", "off", "enable_metrics", False),
        ("MLOPS_ENABLE_SWAGGER", "Yes", "enable_swagger", True),
        ("MLOPS_MODEL_FRAMEWORK", "onnx", "model_framework", ModelFramework.ONNX),
        ("MLOPS_MODEL_VERSION", "1.0", "model_version", "1.0"),
        ("MLOPS_MEMORY_PER_WORKER_MB", "512", "memory_per_worker_mb", 512),
        ("MLOPS_LABELS", "team=ml, note=a=b", "labels", {"team": "ml", "note": "a=b"}),
        ("MLOPS_MAX_RESIDENT_ADAPTERS", "8", "max_resident_adapters", 8),
        ("MLOPS_RAY_ADDRESS", "auto", "ray_address", "auto"),
        ("MLOPS_RAY__ROUTE_PREFIX", "/chat", "ray", RayOptions(route_prefix="/chat")),
        ("MLOPS_RAY__NUM_GPUS", "0.5", "ray", RayOptions(num_gpus=0.5)),
        ("MLOPS_RAY__UPSCALE_DELAY_S", "0", "ray", RayOptions(upscale_delay_s=0)),
        ("MLOPS_RAY__ADAPTER_AFFINITY", "no", "ray", RayOptions(adapter_affinity=False)),
        ("MLOPS_RAY__RESOURCES", "a=1, b=0.5", "ray", RayOptions(resources={"a": 1, "b": 0.5})),
        ("MLOPS_RAY", "auto", "ray", RayOptions()),
        ("MLOPS_WORKERS", "", "workers", 1),
        ("MLOPS_DEBUG", "1", "workers", 1),
    ],
)
def test_environment(variable: str, written: str, field: str, value: Any) -> None:
    assert getattr(BentoMLConfig.load(environ={variable: written}), field) == value


@pytest.mark.parametrize(
    ("variable", "written"),
    [
        ("MLOPS_WORKERS", "two"),
        ("MLOPS_WORKERS", "0"),
        ("MLOPS_TIMEOUT", "nan"),
        ("MLOPS_ENABLE_METRICS", "maybe"),
        ("MLOPS_LABELS", "team"),
        ("MLOPS_MODEL_FRAMEWORK", "keras"),
        ("MLOPS_MAX_RESIDENT_ADAPTERS", "none"),
        ("MLOPS_RAY__ROUTE_PREFIX", "chat"),
        ("MLOPS_RAY__NUM_GPUS", "one"),
        ("MLOPS_RAY__RESOURCES", "a"),
        ("MLOPS_RAY__RESOURCES", "a=0"),
        ("MLOPS_RAY__MAX_SURGE_PERCENT", "25%"),
        ("MLOPS_RAY__GPUS", "1"),
        ("MLOPS_APPLE_SILICON__ENABLE_ANE", "2"),
        ("MLOPS_APPLE_SILICON__ENABLE_AN", "1"),
    ],
)
def test_a_bad_variable_is_named(variable: str, written: str) -> None:
    with pytest.raises(ConfigError, match=variable):
        BentoMLConfig.load(environ={variable: written})


def test_yaml_and_toml_say_the_same(tmp_path: Path) -> None:
    config = BentoMLConfig(
        service_name="adapters", workers=2, labels={"team": "ml"}, model_path="models/a"
    )
    config.apple_silicon.enable_ane = True
    as_yaml = write(tmp_path, "a.yml", yaml.safe_dump(config.to_dict()))
    as_toml = write(
        tmp_path,
        "a.TOML",
        'service_name = "adapters"\nworkers = 2\nmodel_path = "models/a"\n'
        '[labels]\nteam = "ml"\n[apple_silicon]\nenable_ane = true\n',
    )
    assert BentoMLConfig.from_file(as_yaml, {}) == BentoMLConfig.from_file(as_toml, {}) == config


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert BentoMLConfig.from_file(write(tmp_path, "a.yaml", ""), {}) == BentoMLConfig()


def test_the_guides_batching_block(tmp_path: Path) -> None:
    config = BentoMLConfig.from_file(write(tmp_path, "bentofile.yaml", GUIDE_BENTOFILE), {})
    assert (config.max_batch_size, config.max_latency_ms) == (32, 1000)
    off = BentoMLConfig.from_dict({"runner": {"batching": {"enabled": False}}})
    assert off.max_batch_size == 1
    beside = {"max_batch_size": 8, "runner": {"batching": {"max_latency_ms": 5}}}
    assert BentoMLConfig.from_dict(beside).max_batch_size == 8


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"runner": 1}, "runner"),
        ({"runner": {"batch": {}}}, "batching"),
        ({"runner": {"batching": {"max_size": 2}}}, "max_size"),
        ({"runner": {"batching": {"enabled": "yes"}}}, "enabled"),
        ({"runner": {"batching": {"max_batch_size": 0}}}, "max_batch_size"),
        ({"max_batch_size": 8, "runner": {"batching": {"max_batch_size": 4}}}, "max_batch_size"),
        ({"worker": 1}, "did you mean 'workers'"),
        ({"apple_silicon": {1: 2}}, "apple_silicon"),
        ({1: 2}, "fields are text"),
        ([("workers", 1)], "a table"),
    ],
)
def test_bad_tables_are_refused(values: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        BentoMLConfig.from_dict(values)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", json.dumps({"workers": 1}), r"\.yaml, \.yml or \.toml"),
        ("a.yaml", "workers: [", "not valid YAML"),
        ("a.yaml", "- 1", "no table"),
        ("a.yaml", "workers: 0", "workers = 0"),
        ("a.yaml", "worker: 1", "did you mean 'workers'"),
        ("a.yaml", "model_version: 1.0", "in quotes"),
        ("a.yaml", "labels: &a {x: y}\nmodel_name: *a", "aliases"),
        ("a.yaml", "model_name: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("a.yaml", "[" * 200_000, "levels deep"),
        ("a.yaml", "workers: 2025-99-99", "not valid YAML"),
        ("a.yaml", f"workers: {'9' * 5000}", "not valid YAML"),
        ("a.yaml", f"workers: 0x{'f' * 9000}", "a very large number"),
        ("a.toml", "workers =", "not valid TOML"),
        ("a.toml", f"a = {'[' * 20_000}", "not valid TOML"),
        ("a.toml", "[apple_silicon]\nenable_an = true", "did you mean 'enable_ane'"),
        ("a.toml", "#" * (1 << 20) + "#", "over 1 MiB"),
    ],
)
def test_bad_files_are_refused_by_path(
    tmp_path: Path, name: str, content: str, reason: str
) -> None:
    file = write(tmp_path, name, content)
    with pytest.raises(ConfigError, match=reason) as caught:
        BentoMLConfig.from_file(file, {})
    assert str(file) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml cannot be read"):
        BentoMLConfig.from_file(tmp_path / "missing.yaml", {})
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in ("folder.yaml", "pipe.yaml"):
        with pytest.raises(ConfigError, match="is not a file"):
            BentoMLConfig.from_file(tmp_path / name, {})
    (tmp_path / "latin.yaml").write_bytes(b"service_name: \xe4")
    with pytest.raises(ConfigError, match="not valid YAML"):
        BentoMLConfig.from_file(tmp_path / "latin.yaml", {})
