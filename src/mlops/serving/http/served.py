"""What every endpoint works with: the runner, what the service is called, what is allowed.

An endpoint is an async function `(served, request, body) -> Response`; `JSONEndpoint` reads the
body before it. Whatever it raises, `errors.Failures` turns into a status and a JSON error.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlops.serving.http.bodies import read_json_object
from mlops.serving.http.host import RunnerHost
from mlops.serving.http.limits import Limits
from mlops.serving.http.paths import is_handed_over
from mlops.serving.http.settings import HTTPSettings

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

    from mlops.serving.http.kept_adapters import KeptAdapters
    from mlops.serving.http.prometheus import Metrics


@dataclass(frozen=True)
class ServiceInfo:
    """What a service says of itself.

    Attributes:
        model: the model as the user named it: a folder, a tag or a hub id.
        facts: further fields of `/health`, asked in a thread once the model is loaded; what the
            runner's own `describe` says, where it has one, is added to them.
    """

    service_name: str
    project_name: str = "default"
    model_type: str = "mlx"
    model: str | None = None
    model_tag: str | None = None
    digest: str | None = None
    facts: Callable[[], Mapping[str, Any]] | None = None

    @property
    def names(self) -> dict[str, str]:
        return {"service_name": self.service_name, "project_name": self.project_name}

    @property
    def model_names(self) -> frozenset[str]:
        """What a client of OpenAI's API may call the served model."""
        tag_name = self.model_tag.partition(":")[0] if self.model_tag else None
        names = (self.service_name, self.model, self.model_tag, tag_name)
        return frozenset(name for name in names if name)


Elsewhere = Callable[[Request, Mapping[str, Any]], Awaitable[Response | None]]


@dataclass
class Served:
    """One served model.

    Attributes:
        version: of the Bento that is served; None without one.
        started_s: of `time.monotonic()`.
        requests_by_status: answered so far, in this process.
        paths: of the app's routes; set by it.
        metrics: for Prometheus; None where `settings` have them turned off.
        tracer_provider: of OpenTelemetry, for the spans of requests; None takes the process's own.
        limits: of each client, where they may change while it runs; None takes the settings'.
        cancelling_is_leaving: the server cancels a request when its client leaves.
        elsewhere: where there are other replicas: answers a request that one of them is to answer,
            or returns None, and it is answered here.
        kept_adapters: for the worker that takes this one's place, where the server starts one.
    """

    host: RunnerHost
    info: ServiceInfo
    settings: HTTPSettings = field(default_factory=HTTPSettings)
    version: str | None = None
    started_s: float = field(default_factory=time.monotonic)
    requests_by_status: Counter[int] = field(default_factory=Counter)
    paths: frozenset[str] = frozenset()
    metrics: Metrics | None = None
    tracer_provider: TracerProvider | None = None
    limits: Limits | None = None
    cancelling_is_leaving: bool = False
    elsewhere: Elsewhere | None = None
    kept_adapters: KeptAdapters | None = None


Endpoint = Callable[[Served, Request, dict[str, Any]], Awaitable[Response]]


@dataclass(frozen=True)
class JSONEndpoint:
    """An ASGI app that reads a JSON object and has an endpoint answer it.

    Starlette gives a function's requests a handler of errors each; they have one in front of all.
    """

    served: Served
    answer: Endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        is_checked = is_handed_over(scope)
        limit = sys.maxsize if is_checked else self.served.settings.max_body_bytes
        body = await read_json_object(request, limit)
        elsewhere, response = self.served.elsewhere, None
        if elsewhere and not is_checked:
            response = await elsewhere(request, body)
        if response is None:
            response = await self.answer(self.served, request, body)
        await response(scope, receive, send)
