"""`/v1/embeddings` as OpenAI's clients know it, over a runner with the vectors of a test."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from echo_runner import EchoRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from text_runner import LONG_S, ScriptedRunner

from mlops.engine import EmbeddingResult
from mlops.errors import (
    AdapterNotFoundError,
    DeadlineExceededError,
    EngineError,
    EngineShutdownError,
    InvalidRequestError,
    QueueFullError,
)
from mlops.serving.http import RunnerHost, Served, ServiceInfo, create_app
from mlops.serving.http.embeddings import MAX_NUMBERS_AT_ONCE

INFO = ServiceInfo("my_service", model_tag="my_model:1.0.0")
ASK = {"model": "my_service", "input": "Hi"}
Serve = Callable[..., TestClient]


class VectorRunner(EchoRunner):
    """Gives the same vectors to every request, or fails, or never ends."""

    can_embed = True

    def __init__(self, answer: Any = ((0.5, -0.25),), adapter: str | None = None) -> None:
        super().__init__()
        self.answer = answer
        self.adapter = adapter
        self.asked: list[tuple[Any, dict[str, Any]]] = []
        self.futures: list[Future[EmbeddingResult]] = []

    def embed(self, inputs: Any, **options: Any) -> Future[EmbeddingResult]:
        options["deadline_s"] -= time.monotonic()
        self.asked.append((inputs, options))
        future: Future[EmbeddingResult] = Future()
        self.futures.append(future)
        if isinstance(self.answer, Exception):
            future.set_exception(self.answer)
        elif self.answer is not None:
            future.set_result(EmbeddingResult(self.answer, 7, self.adapter))
        return future


@pytest.fixture
def serving() -> Iterator[Serve]:
    hosts: list[RunnerHost] = []

    def serve(runner: EchoRunner, **limits: Any) -> TestClient:
        host = RunnerHost(lambda: runner, **limits)
        hosts.append(host)
        host.start()
        host._loading_ended.result(LONG_S)
        return TestClient(create_app(Served(host, INFO)), raise_server_exceptions=False)

    yield serve
    for host in hosts:
        host.stop()


def test_an_answer(serving: Serve) -> None:
    runner = VectorRunner()
    response = serving(runner).post("/v1/embeddings", json={**ASK, "user": "me"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -0.25]}],
        "model": "my_service",
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    }
    ((inputs, options),) = runner.asked
    assert inputs == "Hi"
    assert (options["adapter"], options["dimensions"]) == (None, None)
    assert 0 < options["deadline_s"] <= 300


def test_base64_is_little_endian_float32(serving: Serve) -> None:
    vectors = np.random.default_rng(0).standard_normal((3, 5)).astype(">f4")
    client = serving(VectorRunner(vectors))
    body = client.post("/v1/embeddings", json={**ASK, "encoding_format": "base64"}).json()
    found = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in body["data"]]
    np.testing.assert_array_equal(found, vectors)
    numbers = client.post("/v1/embeddings", json={**ASK, "encoding_format": "float"}).json()
    np.testing.assert_array_equal(
        np.array([one["embedding"] for one in numbers["data"]], np.float32), vectors
    )
    assert [one["index"] for one in numbers["data"]] == [0, 1, 2]


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_a_large_answer_comes_in_pieces(serving: Serve, encoding_format: str) -> None:
    vectors = np.random.default_rng(0).standard_normal((MAX_NUMBERS_AT_ONCE // 512 + 1, 512))
    response = serving(VectorRunner(vectors)).post(
        "/v1/embeddings", json={**ASK, "encoding_format": encoding_format}
    )
    assert response.headers["content-type"] == "application/json"
    assert "content-length" not in response.headers
    assert [one["index"] for one in response.json()["data"]] == list(range(len(vectors)))
    last = response.json()["data"][-1]["embedding"]
    if encoding_format == "base64":
        last = np.frombuffer(base64.b64decode(last), "<f4")
    np.testing.assert_allclose(last, vectors[-1], rtol=1e-6)


@pytest.mark.parametrize(
    ("model", "adapter"),
    [("my_service", None), ("base", "base"), ("formal", "formal"), ("my_model:formal", "formal")],
)
def test_the_model_may_be_an_adapter(serving: Serve, model: str, adapter: str | None) -> None:
    runner = VectorRunner()
    body = serving(runner).post("/v1/embeddings", json={**ASK, "model": model}).json()
    assert body["model"] == model
    assert runner.asked[0][1]["adapter"] == adapter


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input", None),
        ("model", None),
        ("model", ""),
        ("model", 3),
        ("encoding_format", "int8"),
        ("encoding_format", ["float"]),
        ("dimensions", 0),
        ("dimensions", "3"),
        ("dimensions", 2.5),
        ("dimensions", True),
        ("user", 3),
        ("prompt", "Hi"),
    ],
)
def test_a_wrong_field_is_named(serving: Serve, field: str, value: Any) -> None:
    runner = VectorRunner()
    response = serving(runner).post("/v1/embeddings", json={**ASK, field: value})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", field)
    assert field in error["message"]
    assert not runner.asked


@pytest.mark.parametrize("runner", [EchoRunner(), ScriptedRunner()])
def test_a_model_without_embeddings(serving: Serve, runner: EchoRunner) -> None:
    response = serving(runner).post("/v1/embeddings", json=ASK)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported", "model")
    assert "gives no embeddings" in error["message"]


@pytest.mark.parametrize(
    ("exc", "status", "code"),
    [
        (InvalidRequestError("input[3] is empty", "input[3]"), 400, None),
        (AdapterNotFoundError("there is no adapter"), 404, "model_not_found"),
        (QueueFullError("2 wait", 3.2), 429, "rate_limit_exceeded"),
        (EngineShutdownError("closed"), 503, None),
        (DeadlineExceededError("too late"), 504, None),
        (EngineError("/srv/secret"), 500, None),
    ],
)
def test_what_goes_wrong(serving: Serve, exc: Exception, status: int, code: str | None) -> None:
    response = serving(VectorRunner(exc)).post("/v1/embeddings", json=ASK)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert "secret" not in response.text


@pytest.mark.parametrize("vectors", [((0.5, float("nan")),), ((float("inf"),),), (0.5, 0.25)])
def test_a_runner_that_gives_no_numbers(serving: Serve, vectors: Any) -> None:
    response = serving(VectorRunner(vectors)).post("/v1/embeddings", json=ASK)
    assert response.status_code == 500


def test_a_request_out_of_time_is_given_up(serving: Serve) -> None:
    runner = VectorRunner(None)
    response = serving(runner, timeout_s=0.5).post("/v1/embeddings", json=ASK)
    assert response.status_code == 504
    assert runner.futures[0].cancelled()


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(
    body=st.dictionaries(
        st.sampled_from(("model", "input", "encoding_format", "dimensions", "user", "x")), JSON
    )
)
def test_no_body_is_a_fault(body: Any) -> None:
    host = RunnerHost(VectorRunner)
    host.start()
    host._loading_ended.result(LONG_S)
    client = TestClient(create_app(Served(host, INFO)), raise_server_exceptions=False)
    try:
        assert client.post("/v1/embeddings", json=body).status_code in {200, 400}
    finally:
        host.stop()
