"""BentoML services around a runner: `create_bentoml_service` and `create_lora_service`.

A service is made without loading anything, so `bentoml build` and every worker can import the
module that makes it. When BentoML starts an instance, the model loads in a thread; `/livez` answers
at once, `/readyz` when the model is there. The routes come from `serving.http`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from mlops.errors import BentoMLError, ConfigError
from mlops.serving.bentoml import logs, shutdown, supervision
from mlops.serving.bentoml.config import BentoMLConfig
from mlops.serving.bentoml.metrics_folder import (
    give_own_metrics_folder,
    hold_own_metrics_folder,
)
from mlops.serving.bentoml.served_model import ServedModel, make_served_model
from mlops.serving.http import Served, Status, create_app
from mlops.serving.http.predict import predict as answer_predict

if TYPE_CHECKING:
    from bentoml import Service
    from opentelemetry.trace import TracerProvider
    from starlette.applications import Starlette

__all__ = ["BentoMLError", "create_bentoml_service", "create_lora_service"]

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
    model = make_served_model(
        model_path,
        service_name,
        project_name,
        model_type,
        runner_class,
        adapters=adapters,
        base_model=base_model,
        digest=digest,
        config=config,
    )
    service = _bentoml_service(model)
    give_own_metrics_folder()
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


def _bentoml_service(model: ServedModel) -> Service[Any]:
    """BentoML's service: its instance starts the host, its app stands behind ours."""
    import bentoml

    settings, served, host = model.settings, model.served, model.host

    class ModelService(bentoml.Service):  # type: ignore[misc]
        """A service whose routes come from `serving.http`."""

        http_options = settings.http  # for the command that serves it
        served_model = model  # for a deployment on Ray Serve

        def to_asgi(self, is_main: bool = True) -> Starlette:
            logs.configure(self)
            hold_own_metrics_folder()
            served.tracer_provider = _tracer_provider()
            served.version = self.bento.tag.version if self.bento else None
            try:
                model.read_http_settings()
            except ConfigError as exc:  # the keys
                supervision.report_failure(exc)
                raise
            app = _behind_ours(served, super().to_asgi(is_main), self.middlewares)
            return shutdown.ending_well(app, host, settings.http)

    class Instance:
        """What BentoML runs in each worker."""

        def __init__(self) -> None:
            if supervision.is_supervised():
                logs.attach(service)
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
            supervision.note_ready()  # it was asked to stop: it has not died
            await asyncio.to_thread(host.stop, shutdown.UNLOAD_S)

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
