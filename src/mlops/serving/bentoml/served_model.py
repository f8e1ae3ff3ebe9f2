"""The one model behind a service: from the arguments of `create_bentoml_service` to its host.

No BentoML in here: a replica on Ray Serve that does without it makes the same app from the same
arguments. Nothing is loaded before the host is started.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlops.engine import EngineConfig
from mlops.errors import ConfigError, MLOpsError, ServiceError
from mlops.hardware.home import expand
from mlops.serving.bentoml import supervision
from mlops.serving.bentoml.config import BentoMLConfig, ModelFramework
from mlops.serving.bentoml.serve_options import ServeOptions
from mlops.serving.http import RunnerHost, Served, ServiceInfo
from mlops.serving.http.kept_adapters import KeptAdapters
from mlops.serving.runner.base import Runner

MODEL_TYPES = ("mlx", "lora", "custom")
WAITING_PER_BATCH = 8
"""Requests that may wait, in batches, before new ones are refused with 429."""

_SERVED = (ModelFramework.MLX, ModelFramework.TRANSFORMERS)
_THERMAL_SAMPLE_S = 5.0
_OPERATION = "create_service"
_RUNNER_METHODS = ("load_model", "predict", "predict_batch", "get_memory_usage", "unload_model")
_deployed: ContextVar[Mapping[str, Any] | None] = ContextVar("deployed", default=None)


@dataclass(frozen=True)
class ServedModel:
    """A model that can be served.

    Attributes:
        recipe: arguments that make the same again under the same settings, in JSON types; None
            where a class of the user's makes the runner.
        models: the model, its base and the adapters: paths, tags and hub ids.
    """

    settings: BentoMLConfig
    served: Served
    recipe: dict[str, Any] | None
    models: tuple[str, ...]

    @property
    def host(self) -> RunnerHost:
        return self.served.host

    def read_http_settings(self) -> None:
        """Let the app have its settings; reads the keys.

        Raises:
            ConfigError: the keys cannot be read.
        """
        settings = self.settings
        self.served.settings = settings.http.to_settings(
            enable_metrics=settings.enable_metrics, enable_docs=settings.enable_swagger
        )


@contextlib.contextmanager
def deployed_with(settings: Mapping[str, Any]) -> Iterator[None]:
    """Services that are made in this block have these settings, whatever their own are.

    Args:
        settings: as `BentoMLConfig.from_dict` takes them.
    """
    token = _deployed.set(settings)
    try:
        yield
    finally:
        _deployed.reset(token)


def make_served_model(
    model_path: str | Path | None = None,
    service_name: str | None = None,
    project_name: str | None = None,
    model_type: str | None = None,
    runner_class: type[Any] | None = None,
    *,
    adapters: Mapping[str, str | Path] | None = None,
    base_model: str | Path | None = None,
    digest: str | None = None,
    config: BentoMLConfig | Mapping[str, Any] | None = None,
) -> ServedModel:
    """What `create_bentoml_service` takes, checked, as a host that can be started.

    Raises:
        ServiceError: nothing is at `model_path`, or the arguments do not go together.
        ConfigError: a setting holds what it may not.
    """
    settings = settings_of(config, service_name, project_name)
    if runner_class is None:
        _check_framework(settings)
    model = str(model_path) if model_path is not None else _model_of(settings)
    tag = _find(model)
    kind = _model_type(model, tag, model_type, runner_class)
    options = ServeOptions.given()
    for adapter in options.adapters.values():
        _find(adapter)  # so that a mistyped one is told at once
    named = options.add_to(adapters or {})
    given: dict[str, Any] = {
        "base_model": _absolute(str(base_model)) if base_model else None,
        "adapters": {name: _absolute(str(path)) for name, path in named.items()},
        "digest": digest,
    }
    place = model if tag else _absolute(model)
    make_runner = _runner_maker(
        runner_class or _runner_class(kind, settings), place, settings, given, kind
    )
    if kept := _kept_adapters(settings):
        make_runner = functools.partial(_make_after_changes, make_runner, kept)
    info = ServiceInfo(
        service_name=settings.service_name,
        project_name=settings.project_name,
        model_type=kind,
        model=model,
        model_tag=tag,
        digest=digest,
        facts=functools.partial(_facts, settings),
    )
    host = RunnerHost(
        make_runner,
        max_batch_size=_batch_limit(settings),
        max_latency_ms=settings.max_latency_ms,
        max_waiting=WAITING_PER_BATCH * settings.max_batch_size,
        timeout_s=settings.timeout,
        stuck_after_s=settings.stuck_after_s,
        complete=kept.load_again if kept else None,
        on_loaded=supervision.note_ready,
        on_failure=supervision.report_failure,
    )
    recipe = {"model_path": place, "model_type": kind, **given}
    served = Served(host, info, kept_adapters=kept)
    models = (place, *filter(None, [given["base_model"]]), *given["adapters"].values())
    return ServedModel(settings, served, None if runner_class else recipe, models)


def settings_of(
    config: BentoMLConfig | Mapping[str, Any] | None,
    service_name: str | None,
    project_name: str | None,
) -> BentoMLConfig:
    names = {"service_name": service_name, "project_name": project_name}
    given: dict[str, Any] = {name: value for name, value in names.items() if value is not None}
    if isinstance(config, BentoMLConfig):
        settings = BentoMLConfig.from_dict({**config.to_dict(), **given})
    elif config is None or isinstance(config, Mapping):
        settings = BentoMLConfig.load(config, **given)
    else:
        raise ConfigError(f"config must be a BentoMLConfig or a mapping, not {type(config)}")
    if options := ServeOptions.given().settings:
        settings = settings.with_changes(options)
    if settings.apple_silicon.chip_type is None:
        from mlops.hardware import detect

        settings.apple_silicon = replace(settings.apple_silicon, chip_type=detect().chip_type)
    if (deployed := _deployed.get()) is not None:
        settings = BentoMLConfig.from_dict(deployed)
    settings.http = replace(
        settings.http,
        api_key_file=_from_here(settings.http.api_key_file),
        adapter_folder=_from_here(settings.http.adapter_folder),
    )
    return settings


def _check_framework(settings: BentoMLConfig) -> None:
    framework = ModelFramework(settings.model_framework)
    if framework not in _SERVED:
        raise ServiceError(
            f"model_framework is {framework.value!r}; this version serves MLX and Transformers "
            "language models, and other models with a runner_class",
            _OPERATION,
            {"model_framework": framework.value},
        )


def _model_of(settings: BentoMLConfig) -> str:
    """The model that the settings name: `model_path`, else the tag of `model_name`.

    Raises:
        ServiceError: they name none.
    """
    if settings.model_path:
        return str(settings.model_path)
    if settings.model_name:
        from mlops.registry import tags

        name = tags.valid_name(settings.model_name)
        version = settings.model_version  # any that a tag may have: the store makes some itself
        return f"{name}:{version.lower().replace('+', '-')}" if version else name
    raise ServiceError(
        "no model is named: give model_path, or set model_path or model_name in the config",
        _OPERATION,
    )


def _find(model: str) -> str | None:
    """The tag of a stored model; None for a path or a hub id.

    Raises:
        ServiceError: there is no such thing.
    """
    from mlops.registry import ModelStore
    from mlops.registry.references import is_hub_id, split_reference

    if expand(model).exists():
        return None
    if reference := split_reference(model):
        try:
            return ModelStore().get(reference[0]).tag
        except MLOpsError as exc:
            raise ServiceError(str(exc), _OPERATION, {"model_path": model}) from exc
    if is_hub_id(model):
        return None
    raise ServiceError(
        f"{model!r} does not exist: give a folder, a model tag or a Hugging Face id (org/name)",
        _OPERATION,
        {"model_path": model},
    )


def _absolute(model: str) -> str:
    """A path as it is from any working directory; BentoML's workers change theirs."""
    path = expand(model)
    return str(path.resolve()) if path.exists() else model


def _from_here(path: str | None) -> str | None:
    """A path that need not exist yet, as it is from any working directory."""
    return path and str(expand(path).absolute())


def _model_type(
    model: str, tag: str | None, model_type: str | None, runner_class: type[Any] | None
) -> str:
    if model_type is None:
        if runner_class is not None:
            return "custom"
        return "lora" if _is_adapter(model, tag) else "mlx"
    if model_type not in MODEL_TYPES:
        raise ServiceError(
            f"model_type {model_type!r} is not known: use {', '.join(MODEL_TYPES)}",
            _OPERATION,
            {"model_type": model_type},
        )
    if model_type == "custom" and runner_class is None:
        raise ServiceError(
            "model_type 'custom' needs a runner_class", _OPERATION, {"model_type": model_type}
        )
    return model_type


def _is_adapter(model: str, tag: str | None) -> bool:
    if tag is not None:
        from mlops.registry import ModelStore

        return bool(ModelStore().get(tag).manifest.base_tag)
    return (expand(model) / "adapter_config.json").is_file()


def _runner_class(model_type: str, settings: BentoMLConfig) -> Callable[..., Runner]:
    settings.require_mlx()

    def make(model_path: str, **arguments: Any) -> Runner:
        from mlops.serving.runner import LoRAModelRunner, MLXModelRunner

        if model_type == "lora":
            return LoRAModelRunner(model_path, **arguments)
        return MLXModelRunner(model_path, **arguments)

    return make


def _runner_maker(
    make: Callable[..., Any],
    model_path: str,
    settings: BentoMLConfig,
    given: Mapping[str, Any],
    model_type: str,
) -> functools.partial[Runner]:
    """A function that makes the runner, with the arguments that it takes.

    Raises:
        ServiceError: the class is no runner, or does not take what the user gave.
    """
    if isinstance(make, type):
        missing = [name for name in _RUNNER_METHODS if not callable(getattr(make, name, None))]
        if missing:
            raise ServiceError(
                f"runner_class {make.__name__} has no {', '.join(missing)}; derive it from "
                "MLXModelRunner or see mlops.serving.runner.base.Runner",
                _OPERATION,
                {"missing": missing},
            )
    elif not callable(make):
        raise ServiceError(f"runner_class must be a class, not {make!r}", _OPERATION)
    apple = settings.effective_apple_silicon
    arguments = {
        "enable_mps": apple.enable_mps,
        "enable_unified_memory": apple.enable_unified_memory,
        "model_type": model_type,
        "memory_budget_bytes": _memory_budget_bytes(settings),
        "engine_config": EngineConfig(
            max_rows=settings.max_batch_size,
            row_limit=_batch_limit(settings),
            max_waiting=WAITING_PER_BATCH * settings.max_batch_size,
            max_prompt_tokens=settings.http.max_prompt_tokens,
            max_resident_adapters=settings.max_resident_adapters,
        ),
        **{name: value for name, value in given.items() if value},
    }
    parameters = inspect.signature(make).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        refused = [name for name in arguments if name not in parameters and given.get(name)]
        if refused:
            raise ServiceError(
                f"the runner_class takes no {', '.join(refused)}; leave it out or add it to its "
                "__init__",
                _OPERATION,
                {"refused": refused},
            )
        arguments = {name: value for name, value in arguments.items() if name in parameters}
    return functools.partial(make, model_path, **arguments)


def _make_after_changes(make: functools.partial[Runner], kept: KeptAdapters) -> Runner:
    """The runner without the configured adapters that were unloaded or replaced at run time."""
    kept.read()
    configured = make.keywords.get("adapters")
    return make(adapters=kept.without_changed(configured)) if configured else make()


def _kept_adapters(settings: BentoMLConfig) -> KeptAdapters | None:
    """Where adapters are kept that are loaded at run time; None where no worker comes after."""
    folder = supervision.folder()
    if folder is None or not settings.http.enable_runtime_adapters:
        return None
    allowed = settings.http.adapter_folder
    file = folder / f"adapters-{settings.service_name}.json"
    return KeptAdapters(file, Path(allowed) if allowed else None)


def _memory_budget_bytes(settings: BentoMLConfig) -> int:
    """What one worker may hold of weights, caches and adapters."""
    if settings.memory_per_worker_mb is not None:
        return settings.memory_per_worker_mb * 2**20
    from mlops.engine.layout import MEMORY_SHARE
    from mlops.hardware import detect

    workers = supervision.planned_workers(settings.workers)
    return int(detect().memory_bytes * MEMORY_SHARE / workers)


def _batch_limit(settings: BentoMLConfig) -> Callable[[], int]:
    """How many requests a batch may hold now; the machine's heat is asked every few seconds."""
    sampled_at = -_THERMAL_SAMPLE_S
    limit = settings.max_batch_size

    def limit_now() -> int:
        nonlocal sampled_at, limit
        if time.monotonic() - sampled_at >= _THERMAL_SAMPLE_S:
            from mlops.hardware import thermal_state

            limit = settings.batch_limit(thermal_state())
            sampled_at = time.monotonic()
        return limit

    return limit_now


def _facts(settings: BentoMLConfig) -> dict[str, Any]:
    """What `/health` says of the machine."""
    from mlops.hardware import detect, ensure_blas

    machine = detect()
    hardware = {
        "chip": machine.chip_type or machine.cpu_name,
        "cores": machine.cores,
        "mlx_device": machine.mlx_device,
        "mlx_backend": machine.mlx_backend,
    }
    notes = settings.describe_unhonoured(machine)
    if "mlx.core" in sys.modules:  # a custom runner may do without
        blas = ensure_blas()
        hardware["blas"] = blas.name
        if blas.problem:
            notes.append(f"{blas.problem} {blas.fix or ''}".strip())
    return {"hardware": hardware, "notes": notes}
