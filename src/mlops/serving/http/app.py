"""The service's routes as one ASGI app.

    POST /predict          the runner's own fields and answer          `predict`
    POST /v1/completions, /v1/chat/completions              `completions`, `chat`
    POST /v1/embeddings                texts as vectors                `embeddings`
    POST /v1/load_lora_adapter, /v1/unload_lora_adapter                `adapters`
    GET /v1/models                     the names of models and adapters   `models`
    GET /health, /metrics, /livez, /readyz                             `monitoring`
    GET /docs, /openapi.json           how to use all of them          `docs_page`

The same app answers under BentoML and under Ray. It parses and checks what a client sends, asks the
`RunnerHost`, and turns every failure into a status and a JSON body.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mlops.serving.http.access import guards
from mlops.serving.http.adapters import post_load_lora_adapter, post_unload_lora_adapter
from mlops.serving.http.chat import post_chat_completions
from mlops.serving.http.completions import post_completions
from mlops.serving.http.docs_page import docs_routes
from mlops.serving.http.embeddings import post_embeddings
from mlops.serving.http.errors import error_response
from mlops.serving.http.front import Front
from mlops.serving.http.models import Models
from mlops.serving.http.monitoring import Monitoring
from mlops.serving.http.paths import route_path, speaks_openai
from mlops.serving.http.predict import post_predict
from mlops.serving.http.prometheus import Metrics
from mlops.serving.http.records import record_of
from mlops.serving.http.served import JSONEndpoint, Served


def create_app(
    served: Served, *, middleware: Sequence[Middleware] = (), inner: Starlette | None = None
) -> Starlette:
    """The ASGI app of one service.

    Args:
        served: the model; starting and stopping its host is the caller's.
        middleware: in front of everything, outermost first.
        inner: an app that answers the paths which are not ours, and whose lifespan is used.
    """
    served.metrics = Metrics(served.info) if served.settings.enable_metrics else None
    routes = _routes(served)
    served.paths = frozenset(route.path for route in routes if "{" not in route.path)
    app = Starlette(
        routes=routes,
        middleware=[
            *middleware,
            Middleware(Front, served=served),
            *guards(served.settings, served.limits, served.paths),
        ],
        exception_handlers={HTTPException: _failed, Exception: _failed},
    )
    if inner is not None:
        inner.router.default = app.router.default  # an unknown path gets our JSON error
        for kind in (HTTPException, Exception):
            inner.add_exception_handler(kind, _failed)
        app.router.default = inner
        lifespan = inner.router.lifespan_context
        app.router.lifespan_context = lambda _: lifespan(inner)  # type: ignore[assignment]
    return app


def _routes(served: Served) -> list[Route]:
    monitoring, models = Monitoring(served), Models(served)
    return [
        *(
            Route(path, JSONEndpoint(served, answer), methods=["POST"])
            for path, answer in {
                "/predict": post_predict,
                "/v1/completions": post_completions,
                "/v1/chat/completions": post_chat_completions,
                "/v1/embeddings": post_embeddings,
                "/v1/load_lora_adapter": post_load_lora_adapter,
                "/v1/unload_lora_adapter": post_unload_lora_adapter,
            }.items()
        ),
        Route("/v1/models", models.get_models),
        Route("/v1/models/{id:path}", models.get_model),
        Route("/health", monitoring.get_health),
        Route("/metrics", monitoring.get_metrics),
        Route("/metrics/prometheus", monitoring.get_prometheus),
        Route("/livez", monitoring.get_livez),
        Route("/readyz", monitoring.get_readyz),
        *docs_routes(served),
    ]


async def _failed(request: Request, exc: Exception) -> Response:
    path = route_path(request.scope)[:200]
    if isinstance(exc, HTTPException) and exc.status_code == 404 and exc.detail == "Not Found":
        exc = HTTPException(404, f"there is no {path} here")
    elif isinstance(exc, HTTPException) and exc.status_code == 405:
        allowed = (exc.headers or {}).get("Allow", "another method")
        exc = HTTPException(405, f"{path} answers {allowed}", exc.headers)
    record_of(request.scope).error = type(exc).__name__
    return error_response(exc, like_openai=speaks_openai(request.scope))
