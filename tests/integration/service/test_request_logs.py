"""The request log as a worker writes it: text or JSON, printed and in the service's file."""

from __future__ import annotations

import datetime
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from _pytest.logging import LogCaptureHandler  # on loggers that propagate nothing

from mlops.serving.bentoml import logs
from mlops.serving.bentoml.http_options import HTTPOptions
from mlops.serving.http.records import RequestRecord
from mlops.serving.http.request_log import RequestLog

LOGGERS = ("", "bentoml", "mlops", "uvicorn.error", "uvicorn.access", "circus")
PRINTED = logging.StreamHandler(io.StringIO())


@pytest.fixture(autouse=True)
def logging_as_before(bentoml_home: Path) -> Iterator[None]:
    """Loggers as BentoML leaves them in a worker, and afterwards as they were."""
    before = [
        (one, list(one.handlers), one.level, one.propagate)
        for one in map(logging.getLogger, LOGGERS)
    ]
    formatters = [(handler, handler.formatter) for _, all_, *_ in before for handler in all_]
    logging.getLogger("uvicorn.access").handlers = []  # a test before may have run uvicorn
    PRINTED.setStream(io.StringIO())
    PRINTED.setFormatter(logging.Formatter("[%(levelname)s] %(message)s"))
    logging.getLogger().addHandler(PRINTED)
    yield
    for one, handlers, level, propagate in before:
        for handler in set(one.handlers) - set(handlers) - {PRINTED}:
            handler.close()
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)
    for handler, formatter in formatters:  # pytest's own are among them
        handler.setFormatter(formatter)


def begin(log_format: str) -> None:
    service: Any = SimpleNamespace(
        name="my_service",
        bento=SimpleNamespace(tag="my_service:1.0.0"),
        http_options=HTTPOptions(log_format=log_format),
    )
    logs.configure(service)
    logs.attach(service)


def printed() -> list[str]:
    lines: str = PRINTED.stream.getvalue()
    return lines.splitlines()


def log_a_request(**fields: Any) -> None:
    record = RequestRecord("id-1", method="POST", route="/predict", status=200, **fields)
    record.duration_s = 0.0125
    RequestLog().add(record, "/predict")


def test_text() -> None:
    begin("text")
    log_a_request(adapter="evil\nname")
    line = 'request_id=id-1 method=POST route=/predict status=200 duration_ms=12.5 adapter="evil\\n'
    assert printed()[0].startswith(f"[INFO] {line}")
    (stored,) = logs.read("my_service:1.0.0")
    assert "INFO [my_service:1.0.0]" in stored
    assert line in stored


def test_json() -> None:
    begin("json")
    log_a_request(adapter="evil\nname", completion_tokens=5)
    (line,) = printed()
    told = json.loads(line)
    assert datetime.datetime.fromisoformat(told.pop("time")).tzinfo is not None
    assert told.pop("process") > 0
    assert told == {
        "level": "INFO",
        "logger": "mlops.requests",
        "service": "my_service:1.0.0",
        "message": "POST /predict 200",
        "request_id": "id-1",
        "method": "POST",
        "route": "/predict",
        "status": 200,
        "duration_ms": 12.5,
        "adapter": "evil\nname",
        "prompt_tokens": 0,
        "completion_tokens": 5,
    }
    assert [json.loads(stored)["request_id"] for stored in logs.read("my_service")] == ["id-1"]


def test_every_line_is_an_object_then() -> None:
    begin("json")
    logging.getLogger("mlops.serving").error("failed: %s", "a\nb", exc_info=KeyError("told\nhere"))
    logging.getLogger("uvicorn.error").warning("slow")
    failed, slow = (json.loads(line) for line in printed())
    assert failed["message"] == "failed: a\nb"
    assert "KeyError: 'told\\nhere'" in failed["exception"]
    assert slow["message"] == "slow"
    assert len(logs.read("my_service:1.0.0")) == 2
    assert logs.read("my_service:2.0.0") == []


def test_uvicorn_makes_no_line_of_its_own() -> None:
    begin("text")
    access = logging.getLogger("uvicorn.access")
    theirs = [one for one in access.handlers if not isinstance(one, LogCaptureHandler)]
    assert (theirs, access.propagate) == ([], False)


def test_quiet_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    logging.getLogger("mlops").setLevel(logging.NOTSET)
    monkeypatch.setenv("BENTOML_VERBOSITY", "-1")
    logs.configure(SimpleNamespace(name="my_service", bento=None))  # type: ignore[arg-type]
    log_a_request()
    assert printed() == []


def test_spans_go_where_bentoml_is_told_to_send_them() -> None:
    from bentoml._internal.configuration.containers import BentoMLContainer

    from mlops.serving.bentoml.service import _tracer_provider

    settings = BentoMLContainer.tracing
    assert _tracer_provider() is None
    BentoMLContainer.tracer_provider.reset()
    settings.exporter_type.set("in_memory")
    settings.sample_rate.set(1.0)
    try:
        provider = _tracer_provider()
        assert provider is not None
        with provider.get_tracer("test").start_as_current_span("one") as span:
            assert span.is_recording()
    finally:
        settings.exporter_type.set(None)
        settings.sample_rate.set(None)
        BentoMLContainer.tracer_provider.reset()
