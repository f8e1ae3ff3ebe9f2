from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from asgi_calls import PREDICTION, Route, body, call, front, scope_of, served_with, start
from hypothesis import given
from hypothesis import strategies as st

from mlops.serving.http import HTTPSettings
from mlops.serving.http import request_log as request_log_module
from mlops.serving.http.records import RequestRecord, record_of
from mlops.serving.http.request_log import LOGGER, RequestLine, RequestLog

LONG_S = 30.0


class Written(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.gate = threading.Event()
        self.gate.set()

    def emit(self, record: logging.LogRecord) -> None:
        self.gate.wait(LONG_S)
        self.records.append(record)

    @property
    def lines(self) -> list[str]:
        return [record.getMessage() for record in self.records]


@pytest.fixture
def written() -> Iterator[Written]:
    logger = logging.getLogger(LOGGER)
    handler = Written()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before[0])
    logger.propagate = before[1]


async def answer(scope: Any, _: Any, send: Any) -> None:
    scope["route"] = Route("/predict")
    record = record_of(scope)
    record.note(PREDICTION)
    record.streamed = True
    await start(send)
    await body(send)


def record(**fields: Any) -> RequestRecord:
    return RequestRecord("id-1", method="POST", status=200, route="/predict", **fields)


def test_one_line_for_a_request(written: Written) -> None:
    call(front(answer), scope_of(headers={"x-request-id": "id-1", "authorization": "Bearer key"}))
    (line,) = written.lines
    assert written.records[0].levelno == logging.INFO
    fields = dict(pair.split("=") for pair in line.split(" "))
    assert float(fields.pop("duration_ms")) > 0
    assert fields == {
        "request_id": "id-1",
        "method": "POST",
        "route": "/predict",
        "status": "200",
        "client": "192.0.2.7",
        "adapter": "formal",
        "streamed": "True",
        "prompt_tokens": "3",
        "completion_tokens": "5",
        "finish_reason": "length",
        "queue_ms": "2.0",
        "first_token_ms": "20.0",
        "total_ms": "60.0",
    }


@pytest.mark.parametrize(("status", "level"), [(499, "INFO"), (404, "INFO"), (500, "WARNING")])
def test_its_level(written: Written, status: int, level: str) -> None:
    async def app(_: Any, __: Any, send: Any) -> None:
        await start(send, status)
        await body(send)

    call(front(app))
    assert [record.levelname for record in written.records] == [level]


@pytest.mark.parametrize("route", ["/livez", "/readyz", "/healthz", "/metrics"])
def test_probes_are_not_logged(written: Written, route: str) -> None:
    async def app(scope: Any, _: Any, send: Any) -> None:
        scope["route"] = Route(route)
        await start(send)
        await body(send)

    call(front(app))
    assert written.lines == []


def test_it_can_be_turned_off(written: Written) -> None:
    call(front(answer, served_with(HTTPSettings(log_requests=False))))
    assert written.lines == []


def test_a_path_is_told_where_no_route_answers(written: Written) -> None:
    async def app(_: Any, __: Any, send: Any) -> None:
        await start(send, 404)
        await body(send)

    call(front(app), scope_of("/.env " + "x" * 1000))
    assert 'path="/.env xxx' in written.lines[0]
    assert len(written.lines[0]) < 600


def test_a_prompt_is_cut(written: Written) -> None:
    RequestLog().add(record(prompt={"text": "long " * 100_000}), "/predict")
    assert 'prompt="{\\"text\\": \\"long long' in written.lines[0]
    assert len(written.lines[0]) < 40_000


@given(st.text(), st.text())
def test_no_client_can_forge_a_line_or_a_field(adapter: str, path: str) -> None:
    fields = {"adapter": f"a status=500 {adapter}", "path": path, "status": 200}
    line = str(RequestLine(fields))
    assert line.isascii()
    assert line.isprintable()
    decoder = json.JSONDecoder()
    name, _, rest = line.partition("=")
    value, end = decoder.raw_decode(rest)
    assert (name, value) == ("adapter", fields["adapter"])
    assert rest[end:].startswith(" path=")


def test_lines_are_written_beside_the_requests(written: Written) -> None:
    """A handler that hangs holds no request up, and memory is bounded."""

    async def serve() -> None:
        async with log.writing():
            for number in range(50):
                log.add(record(prompt_tokens=number + 1), "/predict")
            assert written.lines == []
            written.gate.set()

    log = RequestLog()
    written.gate.clear()
    asyncio.run(serve())
    numbers = [line.split("prompt_tokens=")[1].split(" ")[0] for line in written.lines]
    assert numbers == [str(number + 1) for number in range(50)]


def test_what_cannot_be_written_is_given_up(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_log_module, "MAX_UNWRITTEN", 3)

    async def serve() -> None:
        async with log.writing():
            for number in range(8):
                log.add(record(prompt_tokens=number + 1), "/predict")

    log = RequestLog()
    asyncio.run(serve())
    assert [line.split("prompt_tokens=")[1][0] for line in written.lines[:-1]] == ["6", "7", "8"]
    assert written.lines[-1] == "5 lines are missing: the log is too slow"


def test_lines_are_written_while_the_app_runs(written: Written) -> None:
    async def serve() -> None:
        async with log.writing():
            log.add(record(), "/predict")
            async with asyncio.timeout(LONG_S):
                while not written.lines:
                    await asyncio.sleep(0.001)

    log = RequestLog()
    asyncio.run(serve())
    assert len(written.lines) == 1
