from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from asgi_calls import Route, body, call, front, scope_of, served_with, start
from echo_runner import EchoRunner
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect
from starlette.testclient import TestClient
from text_runner import HELLO, ScriptedRunner

from mlops.errors import DeadlineExceededError
from mlops.serving.http import HTTPSettings, RunnerHost, Served, ServiceInfo, create_app
from mlops.serving.http import front as front_module
from mlops.serving.http.records import RequestRecord, record_of


async def answer(scope: Any, _: Any, send: Any) -> None:
    scope["route"] = Route("/predict")
    await start(send)
    await body(send)


def id_in(sent: list[dict[str, Any]]) -> str:
    (value,) = [value for name, value in sent[0]["headers"] if name == b"x-request-id"]
    return value.decode()


@pytest.mark.parametrize("given_id", ["a", "order-17/b", "x" * 128, "~!{}"])
def test_the_clients_id_is_echoed(given_id: str) -> None:
    assert id_in(call(front(answer), scope_of(headers={"x-request-id": given_id}))) == given_id


@pytest.mark.parametrize("given_id", ["", "x" * 129, "two words", "a\tb", "ä", "a\x00"])
def test_an_id_that_is_not_sane_is_replaced(given_id: str) -> None:
    made = id_in(call(front(answer), scope_of(headers={"x-request-id": given_id})))
    assert re.fullmatch("[0-9a-f]{32}", made)


@given(st.binary(max_size=200))
def test_an_id_never_breaks_a_header(given_id: bytes) -> None:
    scope = {**scope_of(), "headers": [(b"x-request-id", given_id)]}
    assert re.fullmatch(r"[\x21-\x7e]{1,128}", id_in(call(front(answer), scope)))


def test_each_request_has_an_id_of_its_own() -> None:
    app = front(answer)
    assert id_in(call(app)) != id_in(call(app))


def test_the_routes_record_is_the_one_that_is_counted() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(record_of(scope))
        await answer(scope, receive, send)

    seen: list[RequestRecord] = []
    served = served_with()
    sent = call(front(app, served))
    (record,) = seen
    assert (record.request_id, record.route, record.method) == (id_in(sent), "/predict", "POST")
    assert (record.status, record.client) == (200, "192.0.2.7")
    assert record.duration_s > 0
    assert served.requests_by_status == {200: 1}


def test_a_request_is_counted_before_its_client_can_know() -> None:
    served = served_with()
    counted: list[dict[int, int]] = []

    async def send(message: dict[str, Any]) -> None:
        counted.append(dict(served.requests_by_status))

    asyncio.run(front(answer, served)(scope_of(), None, send))  # type: ignore[arg-type]
    assert counted == [{}, {200: 1}]


async def leaves_in_mid_stream(_: Any, __: Any, send: Any) -> None:
    await start(send)
    await body(send, more=True)


async def fails_in_mid_stream(_: Any, __: Any, send: Any) -> None:
    await start(send)
    await body(send, more=True)
    raise KeyError("inside")


async def fails_at_once(_: Any, __: Any, ___: Any) -> None:
    raise KeyError("inside")


async def disconnects(_: Any, __: Any, ___: Any) -> None:
    raise ClientDisconnect


async def is_given_up(_: Any, __: Any, send: Any) -> None:
    await start(send)
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("app", "status", "error", "raised"),
    [
        (leaves_in_mid_stream, 499, None, None),
        (disconnects, 499, None, ClientDisconnect),
        (fails_in_mid_stream, 500, "KeyError", KeyError),
        (fails_at_once, 500, "KeyError", KeyError),
        (is_given_up, 500, "CancelledError", asyncio.CancelledError),
    ],
)
def test_an_answer_without_an_end(
    app: Callable[..., Any], status: int, error: str | None, raised: type[BaseException] | None
) -> None:
    served, scope = served_with(), scope_of()
    if raised is None:
        call(front(app, served), scope)
    else:
        with pytest.raises(raised):
            call(front(app, served), scope)
    assert served.requests_by_status == {status: 1}
    assert record_of(scope).error == error


def test_a_client_that_leaves_a_stream_is_counted_as_gone() -> None:
    """Through the routes and the event stream as they are."""
    never = threading.Event()
    runner = ScriptedRunner(HELLO[0], never)
    host = RunnerHost(lambda: runner)
    served = Served(host, ServiceInfo("my_service"))
    app: Any = create_app(served)
    sent: list[dict[str, Any]] = []

    async def ask() -> None:
        has_begun = asyncio.Event()
        messages = [{"type": "http.request", "body": b'{"stream": true}', "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await has_begun.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)
            if message["type"] == "http.response.body":
                has_begun.set()

        scope = scope_of(headers={"content-type": "application/json"})
        async with asyncio.timeout(30):
            await app({**scope, "query_string": b""}, receive, send)

    host.start()
    try:
        asyncio.run(ask())
    finally:
        host.stop()
    assert sent[0]["status"] == 200
    assert sent[-1]["more_body"]
    assert served.requests_by_status == {499: 1}
    assert runner.generatings[0].cancelled.is_set()


def test_a_stream_that_tells_its_error_counts_as_what_it_is() -> None:
    async def app(scope: Any, _: Any, send: Any) -> None:
        await start(send)
        record_of(scope).error = DeadlineExceededError.__name__
        await body(send)

    served = served_with()
    call(front(app, served))
    assert served.requests_by_status == {504: 1}


def test_an_error_keeps_the_status_that_was_sent() -> None:
    async def app(scope: Any, _: Any, send: Any) -> None:
        record_of(scope).error = "InvalidRequestError"
        await start(send, 400)
        await body(send)

    served = served_with()
    call(front(app, served))
    assert served.requests_by_status == {400: 1}


@pytest.mark.parametrize(
    ("method", "path", "status", "route"),
    [
        ("POST", "/predict", 200, "/predict"),
        ("GET", "/predict", 405, "/predict"),
        ("GET", "/v1/models/made/up", 404, "/v1/models/{id:path}"),
        ("GET", "/made/up", 404, "other"),
        ("GET", "/livez", 200, "/livez"),
    ],
)
def test_every_answer_has_an_id_and_a_route(
    method: str, path: str, status: int, route: str
) -> None:
    host = RunnerHost(EchoRunner)
    served = Served(host, ServiceInfo("my_service"), HTTPSettings())
    host.start()
    try:
        client = TestClient(create_app(served), raise_server_exceptions=False)
        response = client.request(method, path, json={"text": "a"} if method == "POST" else None)
        assert response.status_code == status
        assert response.headers["x-request-id"]
        assert f'route="{route}"' in client.get("/metrics/prometheus").text
    finally:
        host.stop()


def test_numbers_that_cannot_be_had_stop_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(ScriptedRunner):
        num_refusals = 0

        def statistics(self) -> dict[str, Any]:
            self.num_refusals += 1
            raise RuntimeError("not now")

    monkeypatch.setattr(front_module, "REFRESH_S", 0.001)
    runner = Broken()
    host = RunnerHost(lambda: runner)
    host.start()
    try:
        with TestClient(create_app(Served(host, ServiceInfo("my_service")))) as client:
            give_up = time.monotonic() + 30
            while runner.num_refusals < 3:
                assert time.monotonic() < give_up
                time.sleep(0.002)
            assert client.get("/livez").status_code == 200
    finally:
        host.stop()
    assert [one.getMessage() for one in caplog.records if one.name == front_module.__name__] == [
        "the metrics could not be refreshed"
    ]
