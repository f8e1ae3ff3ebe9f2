"""Spans of OpenTelemetry, where an exporter is configured: one for each request.

The trace of the client's `traceparent` goes on, and what a runner traces below is part of it. Names
are those of OpenTelemetry's semantic conventions for HTTP servers and for generative AI; what a
client asked is told only where the operator has it logged as well.
"""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from mlops.serving.http.paths import route_path
from mlops.serving.http.records import RequestRecord
from mlops.serving.http.request_log import MAX_PROMPT_CHARACTERS, UNLOGGED_ROUTES

if TYPE_CHECKING:
    from opentelemetry import trace
    from opentelemetry.trace import TracerProvider
    from starlette.types import Scope

    from mlops.serving.http.served import ServiceInfo

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/predict": "text_completion",
}
"""The conventions' names of what a route does."""


def tracing_of(provider: TracerProvider | None, info: ServiceInfo) -> Tracing | None:
    """What makes the spans; None where nobody would get them.

    Args:
        provider: the server's own; None takes the one that the process has, as `opentelemetry-
            instrument` or the `OTEL_…` variables of the SDK set it.
    """
    from opentelemetry import trace

    found = provider or trace.get_tracer_provider()
    if isinstance(found, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
        return None
    return Tracing(found, info)


class Tracing:
    """Begins the spans of one service."""

    def __init__(self, provider: TracerProvider, info: ServiceInfo) -> None:
        from mlops import __version__

        self._tracer = provider.get_tracer("mlops", __version__)
        self._model = info.model_tag or info.service_name

    def begin(self, scope: Scope, record: RequestRecord) -> Span | None:
        """The span of a request; None for a probe, of which nobody wants one."""
        from opentelemetry import propagate, trace

        if route_path(scope) in UNLOGGED_ROUTES:
            return None
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        span = self._tracer.start_span(
            scope["method"],
            propagate.extract(headers),
            trace.SpanKind.SERVER,
            {
                "http.request.method": scope["method"],
                "url.path": scope["path"],
                "url.scheme": scope.get("scheme", "http"),
                "mlops.request_id": record.request_id,
            },
        )
        context = span.get_span_context()
        if context.is_valid:
            record.trace_id = trace.format_trace_id(context.trace_id)
        return Span(span, self._model)


class Span:
    """The span of one request under way."""

    def __init__(self, span: trace.Span, model: str) -> None:
        self._span = span
        self._model = model
        self._began_ns = time.time_ns()

    def as_parent(self) -> AbstractContextManager[Any]:
        """In this block spans that others begin are part of this one."""
        from opentelemetry import trace

        return trace.use_span(self._span, record_exception=False, set_status_on_exception=False)

    def end(self, record: RequestRecord) -> None:
        """Tell what came of the request."""
        from opentelemetry import trace

        span = self._span
        if span.is_recording():
            if record.route != "other":
                span.update_name(f"{record.method} {record.route}")
                span.set_attribute("http.route", record.route)
            span.set_attribute("http.response.status_code", record.status)
            if record.client:
                span.set_attribute("client.address", record.client)
            if record.error or record.status >= 400:
                span.set_attribute("error.type", record.error or str(record.status))
            if record.status >= 500:  # what the client did wrong is no fault of this service
                span.set_status(trace.StatusCode.ERROR)
            if record.finish_reason:
                self._tell_generation(record)
            if record.prompt is not None:
                asked = json.dumps(record.prompt)[:MAX_PROMPT_CHARACTERS]
                span.set_attribute("mlops.prompt", asked)
        span.end()

    def _tell_generation(self, record: RequestRecord) -> None:
        self._span.set_attributes(
            {
                "gen_ai.operation.name": OPERATIONS.get(record.route, "text_completion"),
                "gen_ai.provider.name": "mlops",
                "gen_ai.request.model": record.adapter or self._model,
                "gen_ai.response.model": self._model,
                "gen_ai.response.finish_reasons": [str(record.finish_reason)],
                "gen_ai.usage.input_tokens": record.prompt_tokens,
                "gen_ai.usage.output_tokens": record.completion_tokens,
                "mlops.adapter": record.adapter_label,
            }
        )
        if (first_ms := record.timings.get("first_token_ms")) is not None:
            self._span.add_event(
                "gen_ai.first_token", timestamp=self._began_ns + int(first_ms * 1_000_000)
            )
