from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette._utils import get_route_path
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send
from text_runner import ScriptedRunner

from mlops import errors
from mlops.serving.http import HTTPSettings, RunnerHost, Served, ServiceInfo, create_app
from mlops.serving.http.errors import (
    STATUS,
    Failures,
    describe,
    error_response,
    openai_describe,
    status_of,
)
from mlops.serving.http.paths import route_path, speaks_openai

SECRET = "/srv/secret"

CLASSES = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.MLOpsError)
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_class_has_a_status(kind: type[errors.MLOpsError]) -> None:
    assert kind in STATUS


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.InvalidRequestError("no", "text"), 422),
        (errors.AdapterNotFoundError("no"), 404),
        (errors.QueueFullError("no"), 429),
        (errors.EngineShutdownError("no"), 503),
        (errors.DeadlineExceededError("no"), 504),
        (HTTPException(413, "no"), 413),
        (RuntimeError("no"), 500),
    ],
)
def test_status(error: Exception, status: int) -> None:
    assert status_of(error) == status
    assert error_response(error).status_code == status


def test_a_subclass_has_the_status_of_its_nearest_class() -> None:
    class ToolError(errors.InvalidRequestError):
        pass

    assert status_of(ToolError("no")) == 422


def test_the_field_is_named() -> None:
    told = describe(errors.InvalidRequestError("max_tokens is -1: use 1 or more", "max_tokens"))
    assert told == {
        "error": {
            "type": "InvalidRequestError",
            "message": "max_tokens is -1: use 1 or more",
            "field": "max_tokens",
        }
    }


def test_retry_after_is_whole_seconds() -> None:
    response = error_response(errors.QueueFullError("full", retry_after_s=1.2))
    assert response.headers["Retry-After"] == "2"


def test_an_error_in_openais_form() -> None:
    assert openai_describe(errors.InvalidRequestError("n is 0: use 1 or more", "n")) == {
        "error": {
            "message": "n is 0: use 1 or more",
            "type": "invalid_request_error",
            "param": "n",
            "code": None,
        }
    }


@pytest.mark.parametrize("like_openai", [False, True])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (HTTPException(400, "no"), 400),
        (HTTPException(401, "no", {"WWW-Authenticate": "Bearer"}), 401),
        (HTTPException(404, "no"), 404),
        (HTTPException(408, "no"), 408),
        (HTTPException(413, "no"), 413),
        (HTTPException(415, "no"), 415),
        (HTTPException(429, "no", {"Retry-After": "7"}), 429),
        (HTTPException(499, "no"), 499),
        (HTTPException(503, "no", {"Retry-After": "7"}), 503),
        (errors.EngineShutdownError("no"), 503),
        (errors.ServiceError("no"), 503),
        (errors.DeadlineExceededError("no"), 504),
    ],
)
def test_each_status_has_its_form(error: Exception, status: int, like_openai: bool) -> None:
    response = error_response(error, like_openai=like_openai)
    told = json.loads(bytes(response.body))["error"]
    assert response.status_code == status
    assert told["message"]
    assert isinstance(told["type"], str)
    assert (set(told) == {"message", "type", "param", "code"}) is like_openai
    assert ("Retry-After" in response.headers) is (status in {429, 503})
    assert ("WWW-Authenticate" in response.headers) is (status == 401)


INNER = [
    RuntimeError(SECRET),
    KeyError(SECRET),
    FileNotFoundError(2, "no such file", SECRET),
    HTTPException(500, SECRET),
    *(
        kind(SECRET)
        for kind in CLASSES
        if kind not in {errors.BentoMLError, errors.InvalidRequestError}
        and not issubclass(kind, errors.EngineError)
    ),
    errors.EngineError(SECRET),
    errors.ServiceError(SECRET, SECRET, {"path": SECRET}),
]


@pytest.mark.parametrize("like_openai", [False, True])
@pytest.mark.parametrize("error", INNER, ids=lambda error: type(error).__name__)
def test_an_inner_failure_tells_a_client_nothing(
    error: Exception, like_openai: bool, caplog: pytest.LogCaptureFixture
) -> None:
    error.__cause__ = ValueError(SECRET)
    error.add_note(SECRET)
    response = error_response(error, like_openai=like_openai)
    assert response.status_code >= 500
    assert b"secret" not in bytes(response.body)
    assert "secret" not in str(response.raw_headers)
    assert "secret" in caplog.text


def test_what_was_behind_an_error_is_not_told() -> None:
    error = errors.InvalidRequestError("text is too long", "text")
    error.__cause__ = ValueError(SECRET)
    error.add_note(SECRET)
    for told in (describe(error), openai_describe(error)):
        assert "secret" not in str(told)


def failing(*outer: Middleware) -> TestClient:
    async def fail(_: Any) -> None:
        raise RuntimeError(SECRET)

    async def leave(_: Any) -> None:
        raise ClientDisconnect

    async def fail_midway(_: Any) -> StreamingResponse:
        async def pieces() -> Any:
            yield b"half an ans"
            raise RuntimeError(SECRET)

        return StreamingResponse(pieces())

    routes = [
        Route("/fail", fail),
        Route("/v1/fail", fail),
        Route("/leave", leave),
        Route("/midway", fail_midway),
    ]
    return TestClient(Starlette(routes=routes, middleware=[Middleware(Failures), *outer]))


def test_what_nobody_caught_is_an_error_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    response = failing().get("/fail")
    assert response.status_code == 500
    assert response.json() == {
        "error": {
            "type": "InternalServerError",
            "message": "The service could not answer; its log says why.",
        }
    }
    assert failing().get("/v1/fail").json()["error"]["type"] == "server_error"
    assert "secret" in caplog.text


def test_a_failing_middleware_is_answered_for() -> None:
    class Broken:
        def __init__(self, app: ASGIApp) -> None:
            pass

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            raise errors.QueueFullError("too many")

    response = failing(Middleware(Broken)).get("/nowhere")
    assert (response.status_code, response.headers["Retry-After"]) == (429, "1")


def test_half_an_answer_does_not_look_whole() -> None:
    with pytest.raises(RuntimeError):
        failing().get("/midway")


def test_a_client_that_has_left_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    assert failing().get("/leave").status_code == 499
    assert not caplog.text


@given(
    st.lists(st.sampled_from(["/", "a", "v1", "//"]), max_size=6).map("".join),
    st.sampled_from(["", "/a", "/", "/a/", "a", "/v1", "/a/v1"]),
)
def test_the_path_is_the_routers(path: str, root: str) -> None:
    scope = {"path": path, "root_path": root}
    assert route_path(scope) == get_route_path(scope)


@pytest.mark.parametrize(
    ("path", "root", "expected"),
    [
        ("/v1/models", "", True),
        ("/v1/nowhere", "", True),
        ("/llm/v1/models", "/llm", True),
        ("/predict", "", False),
        ("/predict/v1/x", "", False),
        ("/v1/predict", "/v1", False),
    ],
)
def test_which_form_a_path_speaks(path: str, root: str, expected: bool) -> None:
    assert speaks_openai({"path": path, "root_path": root}) is expected


# As the `openai` package sees them.

KEY = "a-key-of-the-first-team"


async def complete(client: openai.AsyncOpenAI) -> Any:
    return await client.completions.create(model="s", prompt="a")


async def list_models(client: openai.AsyncOpenAI) -> Any:
    return await client.models.list()


async def post_nowhere(client: openai.AsyncOpenAI) -> Any:
    return await client.post("/nowhere", cast_to=object, body={})


async def complete_twice(client: openai.AsyncOpenAI) -> Any:
    await complete(client)
    return await complete(client)


@pytest.mark.parametrize(
    ("call", "refusal", "settings", "expected", "code"),
    [
        (
            list_models,
            None,
            {"api_keys": (KEY + "x",)},
            openai.AuthenticationError,
            "invalid_api_key",
        ),
        (post_nowhere, None, {}, openai.NotFoundError, None),
        (
            complete,
            errors.AdapterNotFoundError("there is no adapter"),
            {},
            openai.NotFoundError,
            "model_not_found",
        ),
        (complete, errors.InvalidRequestError("no", "prompt"), {}, openai.BadRequestError, None),
        (complete, errors.QueueFullError("full"), {}, openai.RateLimitError, "rate_limit_exceeded"),
        (
            complete_twice,
            None,
            {"requests_per_minute": 1},
            openai.RateLimitError,
            "rate_limit_exceeded",
        ),
        (complete, RuntimeError(SECRET), {}, openai.InternalServerError, None),
        (complete, errors.EngineShutdownError("no"), {}, openai.InternalServerError, None),
        (complete, errors.DeadlineExceededError("no"), {}, openai.InternalServerError, None),
    ],
)
def test_what_openais_client_raises(
    call: Callable[[openai.AsyncOpenAI], Any],
    refusal: Exception | None,
    settings: dict[str, Any],
    expected: type[openai.APIStatusError],
    code: str | None,
) -> None:
    host = RunnerHost(lambda: ScriptedRunner(refusal=refusal))
    app = create_app(Served(host, ServiceInfo("s"), HTTPSettings(**settings)))

    async def ask() -> None:
        async with (
            httpx.AsyncClient(transport=httpx.ASGITransport(app)) as transport,
            openai.AsyncOpenAI(
                api_key=KEY, base_url="http://s/v1", http_client=transport, max_retries=0
            ) as client,
        ):
            await call(client)

    host.start()
    try:
        with pytest.raises(expected) as raised:
            asyncio.run(ask())
    finally:
        host.stop()
    assert raised.value.code == code
    assert isinstance(raised.value.body, dict)
    assert set(raised.value.body) == {"message", "type", "param", "code"}
