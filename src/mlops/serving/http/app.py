"""The service's routes as one ASGI app.

    POST /predict          the runner's own fields and answer          `predict`
    POST /v1/completions   OpenAI's text completions                   `completions`
    GET /health, /metrics, /livez, /readyz                             `monitoring`

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
from starlette.routing import BaseRoute, Route

from mlops.serving.http.completions import post_completions
from mlops.serving.http.errors import error_response
from mlops.serving.http.front import Front
from mlops.serving.http.monitoring import Monitoring
from mlops.serving.http.predict import post_predict
from mlops.serving.http.served import Served, json_endpoint


def create_app(
    served: Served, *, middleware: Sequence[Middleware] = (), inner: Starlette | None = None
) -> Starlette:
    """The ASGI app of one service.

    Args:
        served: the model; starting and stopping its host is the caller's.
        middleware: in front of everything, outermost first.
        inner: an app that answers the paths which are not ours, and whose lifespan is used.
    """
    app = Starlette(
        routes=_routes(served),
        middleware=[*middleware, Middleware(Front, served=served)],
        exception_handlers={HTTPException: _failed, Exception: _failed},
    )
    if inner is not None:
        inner.router.default = app.router.default  # an unknown path gets our JSON error
        app.router.default = inner
        lifespan = inner.router.lifespan_context
        app.router.lifespan_context = lambda _: lifespan(inner)  # type: ignore[assignment]
    return app


def _routes(served: Served) -> list[BaseRoute]:
    monitoring = Monitoring(served)
    return [
        Route("/predict", json_endpoint(served, post_predict), methods=["POST"]),
        Route(
            "/v1/completions",
            json_endpoint(served, post_completions, like_openai=True),
            methods=["POST"],
        ),
        Route("/health", monitoring.get_health),
        Route("/metrics", monitoring.get_metrics),
        Route("/livez", monitoring.get_livez),
        Route("/readyz", monitoring.get_readyz),
    ]


async def _failed(request: Request, exc: Exception) -> Response:
    if isinstance(exc, HTTPException) and exc.status_code == 404 and exc.detail == "Not Found":
        exc = HTTPException(404, f"there is no {request.url.path} here: see /docs")
    elif isinstance(exc, HTTPException) and exc.status_code == 405:
        allowed = (exc.headers or {}).get("Allow", "another method")
        exc = HTTPException(405, f"{request.url.path} answers {allowed}", exc.headers)
    return error_response(exc, like_openai="/v1/" in request.url.path)
