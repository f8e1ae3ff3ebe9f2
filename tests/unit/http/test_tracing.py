from __future__ import annotations

from typing import Any

import pytest
from asgi_calls import PREDICTION, Route, body, call, front, scope_of, served_with, start
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from mlops.serving.http.records import record_of
from mlops.serving.http.tracing import tracing_of

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> TracerProvider:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


async def answer(scope: Any, _: Any, send: Any) -> None:
    scope["route"] = Route("/predict")
    record_of(scope).note(PREDICTION)
    await start(send)
    await body(send)


def only(exporter: InMemorySpanExporter) -> ReadableSpan:
    (span,) = exporter.get_finished_spans()
    return span


def test_a_request_is_one_span(exporter: InMemorySpanExporter, provider: TracerProvider) -> None:
    headers = {"x-request-id": "id-1", "authorization": "Bearer key"}
    call(front(answer, served_with(tracer_provider=provider)), scope_of(headers=headers))
    span = only(exporter)
    assert (span.name, span.kind, span.parent) == ("POST /predict", trace.SpanKind.SERVER, None)
    assert span.status.status_code is trace.StatusCode.UNSET
    assert span.attributes == {
        "http.request.method": "POST",
        "url.path": "/predict",
        "url.scheme": "http",
        "http.route": "/predict",
        "http.response.status_code": 200,
        "client.address": "192.0.2.7",
        "mlops.request_id": "id-1",
        "mlops.adapter": "formal",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "mlops",
        "gen_ai.request.model": "formal",
        "gen_ai.response.model": "tiny:1.0.0",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 5,
    }
    (event,) = span.events
    assert event.name == "gen_ai.first_token"
    assert span.start_time is not None
    assert event.timestamp - span.start_time == pytest.approx(20e6, abs=10e6)


def test_the_clients_trace_goes_on(
    exporter: InMemorySpanExporter, provider: TracerProvider
) -> None:
    scope = scope_of(headers={"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"})
    call(front(answer, served_with(tracer_provider=provider)), scope)
    span = only(exporter)
    assert span.parent is not None
    assert trace.format_span_id(span.parent.span_id) == PARENT_ID
    assert trace.format_trace_id(span.get_span_context().trace_id) == TRACE_ID
    assert record_of(scope).trace_id == TRACE_ID


@pytest.mark.parametrize("header", ["", "00-0-0-01", "x" * 5000, f"00-{'0' * 32}-{PARENT_ID}-01"])
def test_a_bad_traceparent_begins_a_new_trace(
    exporter: InMemorySpanExporter, provider: TracerProvider, header: str
) -> None:
    scope = scope_of(headers={"traceparent": header})
    call(front(answer, served_with(tracer_provider=provider)), scope)
    assert only(exporter).parent is None


def test_what_a_route_traces_is_below_it(
    exporter: InMemorySpanExporter, provider: TracerProvider
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        with provider.get_tracer("test").start_as_current_span("inner"):
            await answer(scope, receive, send)

    call(front(app, served_with(tracer_provider=provider)))
    outer, inner = exporter.get_finished_spans()
    assert inner.parent is not None
    assert inner.parent.span_id == outer.get_span_context().span_id
    assert not trace.get_current_span().get_span_context().is_valid


@pytest.mark.parametrize(("status", "is_error"), [(404, False), (499, False), (503, True)])
def test_errors(
    exporter: InMemorySpanExporter, provider: TracerProvider, status: int, is_error: bool
) -> None:
    async def app(_: Any, __: Any, send: Any) -> None:
        await start(send, status)
        await body(send)

    call(front(app, served_with(tracer_provider=provider)), scope_of("/made/up"))
    span = only(exporter)
    assert span.name == "POST"
    assert span.attributes is not None
    assert span.attributes["error.type"] == str(status)
    assert (span.status.status_code is trace.StatusCode.ERROR) is is_error


def test_a_failure_tells_its_class_and_nothing_else(
    exporter: InMemorySpanExporter, provider: TracerProvider
) -> None:
    async def app(_: Any, __: Any, send: Any) -> None:
        await start(send)
        raise KeyError("secret")

    with pytest.raises(KeyError):
        call(front(app, served_with(tracer_provider=provider)))
    span = only(exporter)
    assert "secret" not in span.to_json()
    assert span.attributes is not None
    assert (span.attributes["error.type"], span.status.status_code) == (
        "KeyError",
        trace.StatusCode.ERROR,
    )


def test_a_prompt_is_told_where_it_is_kept(
    exporter: InMemorySpanExporter, provider: TracerProvider
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        record_of(scope).prompt = {"text": "Hi"}
        await answer(scope, receive, send)

    call(front(app, served_with(tracer_provider=provider)))
    attributes = only(exporter).attributes
    assert attributes is not None
    assert attributes["mlops.prompt"] == '{"text": "Hi"}'


def test_probes_are_not_traced(exporter: InMemorySpanExporter, provider: TracerProvider) -> None:
    call(front(answer, served_with(tracer_provider=provider)), scope_of("/livez"))
    assert exporter.get_finished_spans() == ()


def test_what_is_not_sampled_costs_nothing_and_breaks_nothing(
    exporter: InMemorySpanExporter,
) -> None:
    provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    assert call(front(answer, served_with(tracer_provider=provider)))
    assert exporter.get_finished_spans() == ()


def test_nothing_is_traced_where_nobody_has_asked_for_it() -> None:
    served = served_with()
    assert tracing_of(None, served.info) is None
    assert tracing_of(trace.NoOpTracerProvider(), served.info) is None
    scope = scope_of()
    call(front(answer, served), scope)
    assert record_of(scope).trace_id is None
