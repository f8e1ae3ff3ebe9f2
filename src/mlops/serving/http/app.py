"""The service's routes as one ASGI app.

    POST /predict          the runner's own fields and answer
    POST /v1/completions   OpenAI's text completions (`completions`), also as events (`sse`)
    GET /health, /metrics  what the service says of itself

The same app answers under BentoML and under Ray. It parses and checks what a client sends, asks the
`RunnerHost`, and turns every failure into a status and a JSON body.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mlops.errors import AdapterNotFoundError, MLOpsError
from mlops.serving.http.bodies import read_json_object
from mlops.serving.http.completions import CompletionAnswer, parse_completion, unknown_model
from mlops.serving.http.errors import describe, error_response
from mlops.serving.http.host import RunnerHost, Status
from mlops.serving.http.sse import EventStream
from mlops.serving.http.waiting import disconnection
from mlops.serving.runner.base import Prediction

logger = logging.getLogger(__name__)

PATHS = ("/predict", "/v1/completions", "/health", "/metrics")
MAX_BODY_BYTES = 4 * 1024 * 1024
CLIENT_LEFT = 499
_NO_MEMORY = {
    "cache_mb": 0.0,
    "active_mb": 0.0,
    "total_mb": 0.0,
    "peak_mb": 0.0,
    "mlx_available": False,
}


@dataclass(frozen=True)
class ServiceInfo:
    """What a service says of itself.

    Attributes:
        model: the model as the user named it: a folder, a tag or a hub id.
        facts: further fields of `/health`, asked in a thread once the model is loaded; what the
            runner's own `describe` says, where it has one, is added to them.
        enable_metrics: False makes `/metrics` unknown.
    """

    service_name: str
    project_name: str = "default"
    model_type: str = "mlx"
    model: str | None = None
    model_tag: str | None = None
    digest: str | None = None
    facts: Callable[[], Mapping[str, Any]] | None = None
    enable_metrics: bool = True
    max_body_bytes: int = MAX_BODY_BYTES

    @property
    def names(self) -> dict[str, str]:
        return {"service_name": self.service_name, "project_name": self.project_name}

    @property
    def model_names(self) -> frozenset[str]:
        """What a client of OpenAI's API may call the served model."""
        tag_name = self.model_tag.partition(":")[0] if self.model_tag else None
        names = (self.service_name, self.model, self.model_tag, tag_name)
        return frozenset(name for name in names if name)


@dataclass
class Counts:
    """What `/metrics` counts, in this process."""

    started: float = field(default_factory=time.monotonic)
    requests_by_status: Counter[int] = field(default_factory=Counter)


class Handlers:
    """The endpoints. `predict` is also what other ways into the service call."""

    def __init__(
        self,
        host: RunnerHost,
        info: ServiceInfo,
        prometheus: Callable[[Request], Awaitable[Response]] | None = None,
    ) -> None:
        self.host = host
        self.info = info
        self.prometheus = prometheus
        self._counts = Counts()
        self._facts: Mapping[str, Any] | None = None

    async def predict(
        self, input_data: Mapping[str, Any], request: Request | None = None
    ) -> Prediction:
        """Answer one request: the runner's prediction and the names of the service."""
        disconnected = disconnection(request.receive) if request else None
        prediction = await self.host.predict(input_data, disconnected)
        return {**prediction, **self.info.names}

    async def post_predict(self, request: Request) -> Response:
        async def answer(body: Mapping[str, Any]) -> Response:
            return JSONResponse(await self.predict(body, request))

        return await self._answer(request, answer)

    async def post_completions(self, request: Request) -> Response:
        async def answer(body: Mapping[str, Any]) -> Response:
            asked = parse_completion(body, self.info.model_names)
            disconnected = disconnection(request.receive)
            form = CompletionAnswer(asked.model)
            try:
                if not asked.stream:
                    return JSONResponse(
                        form.whole(
                            await self.host.predict(asked.fields, disconnected, text_only=True)
                        )
                    )
                stream = await self.host.stream(asked.fields, disconnected)
            except AdapterNotFoundError as exc:
                raise unknown_model(exc, asked.model) from exc
            return EventStream(
                form.events(stream, asked.include_usage),
                release=stream.cancel,
                deadline_s=stream.deadline_s,
            )

        return await self._answer(request, answer, like_openai=True)

    async def _answer(
        self,
        request: Request,
        answer: Callable[[Mapping[str, Any]], Awaitable[Response]],
        *,
        like_openai: bool = False,
    ) -> Response:
        """Read the body, answer it, and count what became of it."""
        try:
            response = await answer(await read_json_object(request, self.info.max_body_bytes))
        except ClientDisconnect:
            response = Response(status_code=CLIENT_LEFT)
        except Exception as exc:  # told to the client, or to the log
            response = error_response(exc, like_openai=like_openai)
        self._counts.requests_by_status[response.status_code] += 1
        return response

    async def get_health(self, _: Request) -> Response:
        status = self.host.status
        memory = await self._memory()
        body = {
            "status": status.value,
            **self.info.names,
            "model_loaded": status is Status.HEALTHY,
            "memory_usage_mb": memory["total_mb"],
            "mlx_available": memory["mlx_available"],
            "model_type": self.info.model_type,
            "model_tag": self.info.model_tag,
            "digest": self.info.digest,
            **await self._further_facts(),
        }
        if (failure := self.host.failure) is not None:
            body |= _told(failure)
        return JSONResponse(body, 200 if status is Status.HEALTHY else 503)

    async def get_metrics(self, request: Request) -> Response:
        if not self.info.enable_metrics:
            raise HTTPException(404, "the metrics of this service are turned off")
        if self.prometheus and _wants_text(request.headers.get("accept", "")):
            return await self.prometheus(request)
        return JSONResponse(
            {
                **self.info.names,
                "memory_usage": await self._memory(),
                "model_loaded": self.host.status is Status.HEALTHY,
                "process_id": os.getpid(),
                "uptime_s": round(time.monotonic() - self._counts.started, 3),
                "requests_by_status": dict(sorted(self._counts.requests_by_status.items())),
                **self._activity(),
            }
        )

    def _activity(self) -> dict[str, Any]:
        """What runs and waits, from the batcher or from the runner that batches by itself."""
        running, sizes, further = 0, {}, {}
        waiting = self.host.num_waiting
        if (runner := self.host.text_runner) is not None:
            engine = runner.statistics()  # {} from one that is just being unloaded
            running, sizes = engine.get("running", 0), engine.get("batch_sizes", {})
            waiting += engine.get("waiting", 0)
            further = {"engine": engine}
        elif (batcher := self.host.batcher) is not None:
            running, sizes = batcher.num_running, batcher.batch_sizes
        return {
            "requests_running": running,
            "requests_waiting": waiting,
            "batches_by_size": dict(sorted(sizes.items(), key=lambda size: int(size[0]))),
            **further,
        }

    async def _memory(self) -> dict[str, Any]:
        runner = self.host.runner
        if runner is None:
            return dict(_NO_MEMORY)
        # A runner may take its time here; the event loop does not wait for it.
        return {**_NO_MEMORY, **await asyncio.to_thread(runner.get_memory_usage)}

    async def _further_facts(self) -> Mapping[str, Any]:
        runner = self.host.runner
        if self._facts is None and runner is not None:
            facts = await asyncio.to_thread(self.info.facts) if self.info.facts else {}
            describe_model = getattr(runner, "describe", None)
            of_model = describe_model() if describe_model else {}
            known = {name: value for name, value in of_model.items() if value is not None}
            self._facts = {**facts, **known}
        return self._facts or {}


def create_app(
    host: RunnerHost,
    info: ServiceInfo,
    prometheus: Callable[[Request], Awaitable[Response]] | None = None,
) -> Starlette:
    """The ASGI app of one service.

    Args:
        host: the runner; starting and stopping it is the caller's.
        info: what the service says of itself.
        prometheus: answers `/metrics` for a client that asks for Prometheus text.
    """
    return app_of(Handlers(host, info, prometheus))


def app_of(handlers: Handlers) -> Starlette:
    """The ASGI app around handlers that something else uses too."""
    return Starlette(
        routes=[
            Route("/predict", handlers.post_predict, methods=["POST"]),
            Route("/v1/completions", handlers.post_completions, methods=["POST"]),
            Route("/health", handlers.get_health),
            Route("/metrics", handlers.get_metrics),
        ],
        exception_handlers={HTTPException: _failed, Exception: _failed},
    )


async def _failed(request: Request, exc: Exception) -> Response:
    if isinstance(exc, HTTPException) and exc.status_code == 404 and exc.detail == "Not Found":
        exc = HTTPException(404, f"there is no {request.url.path} here: ask {', '.join(PATHS)}")
    elif isinstance(exc, HTTPException) and exc.status_code == 405:
        allowed = (exc.headers or {}).get("Allow", "another method")
        exc = HTTPException(405, f"{request.url.path} answers {allowed}", exc.headers)
    return error_response(exc, like_openai="/v1/" in request.url.path)


def _told(failure: Exception) -> dict[str, Any]:
    if isinstance(failure, MLOpsError):
        return {"error": {"type": type(failure).__name__, "message": str(failure)}}
    return describe(failure)


def _wants_text(accept: str) -> bool:
    """True for the `Accept` of a Prometheus scraper; a browser or curl gets JSON."""
    accept = accept.lower()
    is_text = "text/plain" in accept or "openmetrics" in accept
    return is_text and "application/json" not in accept and "text/html" not in accept
