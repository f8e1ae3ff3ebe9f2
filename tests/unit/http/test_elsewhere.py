"""A request that another replica of the service answers, as the one that got it sees it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from asgi_calls import scope_of
from echo_runner import EchoRunner
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.testclient import TestClient
from text_runner import ScriptedRunner

from mlops.serving.http import HTTPSettings, RunnerHost, Served, ServiceInfo, create_app
from mlops.serving.http.paths import handed_over
from mlops.serving.http.records import record_of
from mlops.serving.http.request_log import LOGGER

KEY = "a-key-of-the-first-team"
JSON_HEADER = (b"content-type", b"application/json")
OF_ANOTHER = {"prediction": "from another replica"}


class OtherReplica:
    """Answers in its place, or leaves it to the replica that was asked."""

    def __init__(self, answer: Response | Exception | None) -> None:
        self.answer = answer
        self.asked: list[tuple[str, Mapping[str, Any]]] = []

    async def __call__(self, request: Request, body: Mapping[str, Any]) -> Response | None:
        self.asked.append((request.url.path, body))
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer is not None:
            record_of(request.scope).is_elsewhere = True
        return self.answer


def answering() -> OtherReplica:
    return OtherReplica(JSONResponse(OF_ANOTHER, 202, {"x-from": "b"}))


def leaving_it() -> OtherReplica:
    return OtherReplica(None)


Serve = Callable[..., tuple[TestClient, Served]]


@pytest.fixture
def serving() -> Iterator[Serve]:
    """Makes a service that has another replica; returns a client of it, and it."""
    hosts: list[RunnerHost] = []

    def serve(
        elsewhere: Any,
        runner: EchoRunner | None = None,
        settings: HTTPSettings = HTTPSettings(),  # noqa: B008
    ) -> tuple[TestClient, Served]:
        host = RunnerHost(lambda: runner or ScriptedRunner())
        hosts.append(host)
        host.start()
        served = Served(host, ServiceInfo("my_service"), settings, elsewhere=elsewhere)
        return TestClient(create_app(served), raise_server_exceptions=False), served

    yield serve
    for host in hosts:
        host.stop()


def requests_counted(client: TestClient) -> set[str]:
    lines = client.get("/metrics/prometheus").text.splitlines()
    return {line for line in lines if line.startswith("mlops_requests_total{")}


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.name == LOGGER]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/predict", {"text": "a", "adapter": "formal"}),
        ("/v1/completions", {"model": "formal", "prompt": "a"}),
        ("/v1/chat/completions", {"model": "formal", "messages": []}),
        ("/v1/embeddings", {"model": "formal", "input": "a"}),
    ],
)
def test_another_replicas_answer_is_the_answer(
    serving: Serve, path: str, body: dict[str, Any]
) -> None:
    runner, other = ScriptedRunner(), answering()
    client, _ = serving(other, runner)
    response = client.post(path, json=body)
    assert (response.status_code, response.json()) == (202, OF_ANOTHER)
    assert response.headers["x-from"] == "b"
    assert other.asked == [(path, body)]
    assert not runner.asked


def test_what_it_leaves_is_answered_here(serving: Serve) -> None:
    other = leaving_it()
    client, served = serving(other)
    body = {"text": "a"}
    response = client.post("/predict", json=body)
    assert (response.status_code, response.json()["prediction"]) == (200, "Hello")
    assert other.asked == [("/predict", body)]
    assert served.requests_by_status == {200: 1}


def test_what_was_handed_over_is_not_handed_on(serving: Serve) -> None:
    """Or two replicas that disagree about an adapter would send a request to and fro."""
    other = answering()
    sent, served = ask_handed_over(serving, other, {"text": "a"})
    assert sent[0]["status"] == 200
    assert not other.asked
    assert served.requests_by_status == {200: 1}


def test_what_was_handed_over_has_been_measured_already(serving: Serve) -> None:
    """Written anew, a body can be longer than what the client sent."""
    settings = HTTPSettings(max_body_bytes=1024)
    body = {"text": "ä" * 2000, "stop": [[]] * 200}
    sent, _ = ask_handed_over(serving, None, body, settings)
    assert sent[0]["status"] == 200
    client, _ = serving(None, settings=settings)
    assert client.post("/predict", json=body).status_code == 413


def ask_handed_over(
    serving: Serve,
    elsewhere: OtherReplica | None,
    body: Mapping[str, Any],
    settings: HTTPSettings = HTTPSettings(),  # noqa: B008
    scope: Mapping[str, Any] | None = None,
) -> tuple[list[dict[str, Any]], Served]:
    """What the replica that a request is handed to sends back."""
    client, served = serving(elsewhere, settings=settings)
    app: Any = client.app
    told = handed_over(scope or {**scope_of(), "headers": [JSON_HEADER]})
    told["query_string"] = b""
    return call_with(app, told, json.dumps(body).encode()), served


def call_with(app: Any, scope: dict[str, Any], body: bytes) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return unread.pop() if unread else await asyncio.Event().wait()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent


@pytest.mark.parametrize(
    ("content", "status"), [(b"{", 400), (b"[]", 400), (b'{"text": "' + b"a" * 1024 + b'"}', 413)]
)
def test_a_body_that_is_refused_goes_nowhere(serving: Serve, content: bytes, status: int) -> None:
    other = answering()
    client, _ = serving(other, settings=HTTPSettings(max_body_bytes=1024))
    headers = {"Content-Type": "application/json"}
    assert client.post("/predict", content=content, headers=headers).status_code == status
    assert not other.asked


def test_who_is_not_let_in_goes_nowhere(serving: Serve) -> None:
    other = answering()
    client, served = serving(other, settings=HTTPSettings(api_keys=(KEY,)))
    assert client.post("/predict", json={"text": "a"}).status_code == 401
    assert not other.asked
    assert served.requests_by_status == {401: 1}


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/livez", "/openapi.json"])
def test_what_has_no_body_is_answered_here(serving: Serve, path: str) -> None:
    other = answering()
    client, _ = serving(other)
    assert client.get(path).status_code == 200
    assert not other.asked


def test_only_the_replica_that_answers_counts_and_logs(
    serving: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    client, served = serving(answering())
    assert client.post("/predict", json={"text": "a"}).status_code == 202
    assert not served.requests_by_status
    assert not requests_counted(client)
    assert not logged(caplog)
    served.elsewhere = leaving_it()
    assert client.post("/predict", json={"text": "a"}).status_code == 200
    assert served.requests_by_status[200] == 2  # the metrics were asked for, too
    assert len(logged(caplog)) == 1
    assert any('route="/predict",status="200"' in line for line in requests_counted(client))


def test_what_fails_on_the_way_is_counted_here(
    serving: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    client, served = serving(OtherReplica(RuntimeError("secret path /srv")))
    response = client.post("/predict", json={"text": "a"})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert served.requests_by_status == {500: 1}
    assert "error=RuntimeError" in logged(caplog)[0]


def test_the_replica_that_answers_knows_whose_key_it_was(
    serving: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    settings = HTTPSettings(api_keys=(KEY,))
    scopes: list[Mapping[str, Any]] = []

    async def keep(request: Request, _: Mapping[str, Any]) -> None:
        scopes.append(request.scope)

    client, _ = serving(keep, settings=settings)
    client.post("/predict", json={"text": "a"}, headers={"X-API-Key": KEY})
    ask_handed_over(serving, None, {"text": "a"}, settings, scopes[0])
    here, there = logged(caplog)
    assert "client=key-" in here
    assert client_in(there) == client_in(here)


def client_in(line: str) -> str:
    return dict(pair.split("=", 1) for pair in line.split(" "))["client"]
