"""BentoML services around a runner: `create_bentoml_service` and `create_lora_service`.

A service is made without loading anything, so `bentoml build` and every worker can import the
module that makes it. When BentoML starts an instance, the model loads in a thread; `/livez` answers
at once, `/readyz` when the model is there. The routes come from `serving.http`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from mlops.engine import EngineConfig
from mlops.errors import BentoMLError, ConfigError, MLOpsError, ServiceError
from mlops.serving.bentoml import logs, shutdown, supervision
from mlops.serving.bentoml.config import BentoMLConfig, ModelFramework
from mlops.serving.http import RunnerHost, Served, ServiceInfo, Status, create_app
from mlops.serving.http.predict import predict as answer_predict
from mlops.serving.runner.base import Runner

if TYPE_CHECKING:
    from bentoml import Service
    from opentelemetry.trace import TracerProvider
    from starlette.applications import Starlette

__all__ = ["BentoMLError", "create_bentoml_service", "create_lora_service"]

MODEL_TYPES = ("mlx", "lora", "custom")
WAITING_PER_BATCH = 8
"""Requests that may wait, in batches, before new ones are refused with 429."""

_SERVED = (ModelFramework.MLX, ModelFramework.TRANSFORMERS)
_THERMAL_SAMPLE_S = 5.0
_OPERATION = "create_service"
_RUNNER_METHODS = ("load_model", "predict", "predict_batch", "get_memory_usage", "unload_model")
_SWAGGER_ROUTES = frozenset({"index", "openapi-spec", "static_content", "assets"})


def create_bentoml_service(
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
) -> Service[Any]:
    """Make the BentoML service of one model. Assign it to a variable of your module: `svc = …`.

    Args:
        model_path: a folder, a model tag (also with its digest, `name:version@sha256:…`) or a
            Hugging Face id; by default the config's
            `model_path`, or else the tag of its `model_name` and `model_version`.
        service_name: by default the config's.
        project_name: by default the config's.
        model_type: "mlx" (a language model), "lora" (an adapter with its base) or "custom"; by
            default what the files are, and "custom" with a `runner_class`.
        runner_class: makes the runner, called with `model_path` and with those of the other
            settings that it takes; see `mlops.serving.runner.base.Runner`.
        adapters: further adapters that a request can name: folder, tag or hub id by name.
        base_model: the base of an adapter, where the adapter does not say.
        digest: what the stored model must have.
        config: settings; a mapping gives way to `MLOPS_…` variables, and without one they come from
            these variables and the defaults.

    Raises:
        ServiceError: nothing is at `model_path`, or the arguments do not go together.
        ConfigError: a setting holds what it may not.
    """
    settings = _settings(config, service_name, project_name)
    if runner_class is None:
        _check_framework(settings)
    model = str(model_path) if model_path is not None else _model_of(settings)
    tag = _find(model)
    kind = _model_type(model, tag, model_type, runner_class)
    make_runner = _runner_maker(
        runner_class or _runner_class(kind, settings),
        model if tag else _absolute(model),
        settings,
        given={
            "base_model": _absolute(str(base_model)) if base_model else None,
            "adapters": {name: _absolute(str(path)) for name, path in (adapters or {}).items()},
            "digest": digest,
        },
        model_type=kind,
    )
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
        on_loaded=supervision.end_loading,
        on_failure=supervision.report_failure,
    )
    service = _bentoml_service(settings, host, info)
    service._caller_module = _caller()  # BentoML looks for the service in this module
    return service


def create_lora_service(
    model_path: str | Path,
    service_name: str | None = None,
    project_name: str | None = None,
    *,
    adapters: Mapping[str, str | Path] | None = None,
    base_model: str | Path | None = None,
    digest: str | None = None,
    config: BentoMLConfig | Mapping[str, Any] | None = None,
) -> Service[Any]:
    """Make the BentoML service of an adapter; as `create_bentoml_service` with "lora"."""
    return create_bentoml_service(
        model_path,
        service_name,
        project_name,
        "lora",
        adapters=adapters,
        base_model=base_model,
        digest=digest,
        config=config,
    )


def _settings(
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
    if settings.apple_silicon.chip_type is None:
        from mlops.hardware import detect

        settings.apple_silicon = replace(settings.apple_silicon, chip_type=detect().chip_type)
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
        version = settings.model_version
        return f"{name}:{tags.valid_version(version)}" if version else name
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

    if Path(model).expanduser().exists():
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
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model


def _from_here(path: str | None) -> str | None:
    """A path that need not exist yet, as it is from any working directory."""
    return path and str(Path(path).expanduser().absolute())


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
    return (Path(model).expanduser() / "adapter_config.json").is_file()


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
) -> Callable[[], Runner]:
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


def _bentoml_service(settings: BentoMLConfig, host: RunnerHost, info: ServiceInfo) -> Service[Any]:
    """BentoML's service: its instance starts the host, its app stands behind ours."""
    import bentoml

    served = Served(host, info)

    class ModelService(bentoml.Service):  # type: ignore[misc]
        """A service whose routes come from `serving.http`."""

        http_options = settings.http  # for the command that serves it

        def to_asgi(self, is_main: bool = True) -> Starlette:
            logs.configure(self)
            served.tracer_provider = _tracer_provider()
            try:
                served.settings = settings.http.to_settings(
                    enable_metrics=settings.enable_metrics, enable_docs=settings.enable_swagger
                )
            except ConfigError as exc:  # the keys; BentoML would start the worker for ever
                supervision.report_failure(exc)
                raise
            app = _behind_ours(served, super().to_asgi(is_main), self.middlewares)
            return shutdown.ending_well(app, host, settings.http)

    class Instance:
        """What BentoML runs in each worker."""

        def __init__(self) -> None:
            if supervision.begin_loading(service):
                host.start()

        @bentoml.api  # type: ignore[untyped-decorator]
        async def predict(  # noqa: PLR0917 - BentoML's client may pass them by position
            self,
            text: str | None = None,
            max_tokens: int | None = None,
            temperature: float | None = None,
            adapter: str | None = None,
            messages: list[dict[str, Any]] | None = None,
            prompt: str | None = None,
            input: Any = None,  # noqa: A002 - the field's name in a request
            top_p: float | None = None,
            top_k: int | None = None,
            min_p: float | None = None,
            seed: int | None = None,
            stop: list[str] | None = None,
            repetition_penalty: float | None = None,
            presence_penalty: float | None = None,
            frequency_penalty: float | None = None,
            logit_bias: dict[str, float] | None = None,
            stop_token_ids: list[int] | None = None,
            ignore_eos: bool | None = None,
            logprobs: int | None = None,
            n: int | None = None,
            response_format: dict[str, Any] | None = None,
            tools: list[dict[str, Any]] | None = None,
            tool_choice: Any = None,
            parallel_tool_calls: bool | None = None,
        ) -> dict[str, Any]:
            """Answer one request: generated text, or what the model computes from `input`."""
            fields = locals()
            del fields["self"]
            given = {name: value for name, value in fields.items() if value is not None}
            return await answer_predict(served, given)

        async def __is_ready__(self) -> bool:
            return host.status is Status.HEALTHY

        @bentoml.on_shutdown  # type: ignore[untyped-decorator]
        async def stop(self) -> None:
            supervision.end_loading()
            await asyncio.to_thread(host.stop)

    Instance.__name__ = Instance.__qualname__ = settings.service_name
    service: Service[Any] = bentoml.service(
        name=settings.service_name, service_class=ModelService, **settings.to_bentoml_config()
    )(Instance)
    return service


def _behind_ours(
    served: Served, app: Starlette, users_own: Sequence[tuple[Any, dict[str, Any]]]
) -> Starlette:
    """BentoML's app behind the routes of `serving.http`.

    The middlewares that a user has added to the service come first, and so hold for every route.
    BentoML's own are left out: ours trace, count and log each request once, at a fraction of their
    cost, also when BentoML's app answers it.

    Args:
        users_own: classes and options, outermost first.
    """
    routes = app.router.routes
    routes[:] = [r for r in routes if getattr(r, "name", None) not in _SWAGGER_ROUTES]
    if served.settings.enable_docs:
        # BentoML's own page sends its visitors' steps to others; a user's page at / comes before.
        routes.append(Route("/", _to_docs))
    # What is left serves BentoML's own routes: its time limit, CORS as configured, its context.
    not_again = {kind for kind, _ in users_own} | _replaced_middlewares()
    app.user_middleware = [one for one in app.user_middleware if one.cls not in not_again]
    first = [Middleware(kind, **options) for kind, options in users_own]
    return create_app(served, middleware=first, inner=app)


async def _to_docs(request: Request) -> Response:
    return RedirectResponse(f"{request.scope.get('root_path', '')}/docs")


def _tracer_provider() -> TracerProvider | None:
    """What BentoML's configuration says about traces; None where it says nothing."""
    from bentoml._internal.configuration.containers import BentoMLContainer

    provider: TracerProvider = BentoMLContainer.tracer_provider.get()
    return provider if BentoMLContainer.tracing.exporter_type.get() else None


def _replaced_middlewares() -> set[Any]:
    from bentoml._internal.server.http.access import AccessLogMiddleware
    from bentoml._internal.server.http.instruments import RunnerTrafficMetricsMiddleware
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware

    return {AccessLogMiddleware, RunnerTrafficMetricsMiddleware, OpenTelemetryMiddleware}


def _caller() -> str:
    frame = sys._getframe(1)
    while frame.f_globals["__name__"] == __name__ and frame.f_back:
        frame = frame.f_back
    name: str = frame.f_globals["__name__"]
    return name
