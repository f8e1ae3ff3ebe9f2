from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from echo_runner import CancellableRunner, EchoRunner
from starlette.testclient import TestClient

from mlops.errors import IntegrityError, ServiceError
from mlops.serving.http import HTTPSettings, RunnerHost, Served, ServiceInfo, create_app

NAMES = {"service_name": "my_service", "project_name": "my_project"}
INFO = ServiceInfo("my_service", "my_project", "lora")
SETTINGS = HTTPSettings()
LONG_S = 30.0


def wait_for(condition: Callable[[], Any]) -> None:
    give_up = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < give_up, "it never came"
        time.sleep(0.002)


@pytest.fixture
def serving() -> Iterator[Callable[..., TestClient]]:
    """Makes a client of a service; stops them all afterwards."""
    hosts: list[RunnerHost] = []

    def serve(
        runner: EchoRunner,
        info: ServiceInfo = INFO,
        settings: HTTPSettings = SETTINGS,
        **limits: Any,
    ) -> TestClient:
        host = RunnerHost(lambda: runner, **limits)
        hosts.append(host)
        host.start()
        wait_for(lambda: host.status != "loading")
        return TestClient(create_app(Served(host, info, settings)), raise_server_exceptions=False)

    yield serve
    for host in hosts:
        if isinstance(host.runner, EchoRunner):
            host.runner.gate.set()
        host.stop()


@pytest.fixture
def client(serving: Callable[..., TestClient]) -> TestClient:
    return serving(EchoRunner())


def test_predict(client: TestClient) -> None:
    response = client.post("/predict", json={"text": "Grüße", "max_tokens": 5})
    assert response.status_code == 200
    assert response.json() == {
        "prediction": "Grüße",
        "mlx_optimized": True,
        "model_type": "mlx",
        **NAMES,
    }


def test_health(client: TestClient) -> None:
    response = client.get("/health")
    assert response.status_code == 200
    body = response.json()
    assert (
        body.items()
        >= {
            "status": "healthy",
            **NAMES,
            "model_loaded": True,
            "memory_usage_mb": 3.0,
            "mlx_available": True,
            "model_type": "lora",
        }.items()
    )


def test_health_has_the_facts_of_the_machine_and_the_model(
    serving: Callable[..., TestClient],
) -> None:
    class DescribedRunner(EchoRunner):
        def describe(self) -> dict[str, Any]:
            return {"layout": "float32"}

    info = ServiceInfo("s", facts=lambda: {"notes": ["enable_ane: not here"]})
    body = serving(DescribedRunner(), info).get("/health").json()
    assert body["notes"] == ["enable_ane: not here"]
    assert body["layout"] == "float32"


def test_metrics(client: TestClient) -> None:
    client.post("/predict", json={"text": "a"})
    client.post("/predict", json={"adapter": "none"})
    body = client.get("/metrics").json()
    assert body.items() >= {**NAMES, "model_loaded": True}.items()
    assert (
        body["memory_usage"].items()
        >= {
            "cache_mb": 1.0,
            "active_mb": 2.0,
            "total_mb": 3.0,
            "mlx_available": True,
        }.items()
    )
    assert body["requests_by_status"] == {"200": 1, "404": 1}
    assert body["batches_by_size"] == {"1": 2}
    assert body["requests_waiting"] == 0


def test_metrics_can_be_turned_off(serving: Callable[..., TestClient]) -> None:
    client = serving(EchoRunner(), settings=HTTPSettings(enable_metrics=False))
    assert client.get("/metrics").status_code == 404


@pytest.mark.parametrize(
    ("fields", "status", "error"),
    [
        ({"adapter": "other"}, 404, {"type": "AdapterNotFoundError"}),
        ({"wrong": 1}, 422, {"type": "InvalidRequestError", "field": "wrong"}),
        ({"text": "crash"}, 500, {"type": "InternalServerError"}),
    ],
)
def test_what_the_runner_refuses(
    client: TestClient, fields: dict[str, Any], status: int, error: dict[str, str]
) -> None:
    response = client.post("/predict", json=fields)
    assert response.status_code == status
    assert response.json()["error"].items() >= error.items()
    assert "secret" not in response.text


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("text/plain", b'{"text": "a"}', 415),
        ("application/vnd.bentoml+pickle", b"\x80\x04.", 415),
        ("multipart/form-data; boundary=x", b"--x--", 415),
        ("application/json; charset=utf-8", b'{"text": "a"}', 200),
        ("application/json", b"{", 400),
        ("application/json", b"[]", 400),
    ],
)
def test_bodies(client: TestClient, content_type: str, body: bytes, status: int) -> None:
    response = client.post("/predict", content=body, headers={"content-type": content_type})
    assert response.status_code == status
    assert status == 200 or response.json()["error"]["message"]


def test_a_large_body_is_refused_while_it_is_read(serving: Callable[..., TestClient]) -> None:
    client = serving(EchoRunner(), settings=HTTPSettings(max_body_bytes=1000))
    read = 0

    def chunks() -> Iterator[bytes]:
        nonlocal read
        for _ in range(10_000):
            read += 100
            yield b" " * 100

    response = client.post(
        "/predict", content=chunks(), headers={"content-type": "application/json"}
    )
    assert response.status_code == 413
    assert response.json()["error"]["type"] == "ContentTooLarge"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/predict", 405),
        ("POST", "/health", 405),
        ("DELETE", "/metrics", 405),
        ("GET", "/nowhere", 404),
    ],
)
def test_wrong_method_or_path(client: TestClient, method: str, path: str, status: int) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert path in response.json()["error"]["message"]


def test_before_anything_is_loaded() -> None:
    host = RunnerHost(EchoRunner)
    client = TestClient(create_app(Served(host, INFO)))
    health = client.get("/health")
    assert health.status_code == 503
    assert health.json()["model_loaded"] is False
    assert client.post("/predict", json={"text": "a"}).status_code == 503


@pytest.mark.parametrize(
    ("load_error", "status"), [(None, 200), (ServiceError("no such architecture"), 503)]
)
def test_a_request_waits_while_the_model_loads(load_error: Exception | None, status: int) -> None:
    gate = threading.Event()

    def make_runner() -> EchoRunner:
        gate.wait(LONG_S)
        return EchoRunner(load_error)

    host = RunnerHost(make_runner)
    host.start()
    client = TestClient(create_app(Served(host, INFO)), raise_server_exceptions=False)
    assert client.get("/health").json()["status"] == "loading"
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "/predict", json={"text": "a"})
        wait_for(lambda: host.num_waiting)
        assert not answer.done()
        gate.set()
        assert answer.result(LONG_S).status_code == status
    host.stop()


@pytest.mark.parametrize(
    ("error", "shown"),
    [(ServiceError("no such architecture"), "no such architecture"), (KeyError("inside"), "log")],
)
def test_a_model_that_cannot_be_loaded(
    serving: Callable[..., TestClient], error: Exception, shown: str
) -> None:
    told: list[Exception] = []
    client = serving(EchoRunner(load_error=error), on_failure=told.append)
    health = client.get("/health")
    assert health.status_code == 503
    assert health.json()["status"] == "unhealthy"
    assert shown in health.json()["error"]["message"]
    assert client.post("/predict", json={"text": "a"}).status_code == 503
    assert told == [error]


def test_a_request_that_takes_too_long(serving: Callable[..., TestClient]) -> None:
    runner = CancellableRunner()
    runner.gate.clear()
    response = serving(runner, timeout_s=0.05).post("/predict", json={"text": "a"})
    assert response.status_code == 504
    assert runner.was_cancelled.wait(LONG_S)


def test_too_many_requests(serving: Callable[..., TestClient]) -> None:
    runner = EchoRunner()
    runner.gate.clear()
    client = serving(runner, max_waiting=2)

    async def ask_five() -> list[httpx.Response]:
        transport = httpx.ASGITransport(client.app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as ask:
            first = asyncio.ensure_future(ask.post("/predict", json={"text": "first"}))
            await asyncio.to_thread(runner.started.wait, LONG_S)
            others = [
                asyncio.ensure_future(ask.post("/predict", json={"text": "a"})) for _ in range(4)
            ]
            await asyncio.wait(others, return_when=asyncio.FIRST_COMPLETED)
            # The service answers while the runner is at work.
            assert (await ask.get("/health")).status_code == 200
            metrics = (await ask.get("/metrics")).json()
            assert (metrics["requests_running"], metrics["requests_waiting"]) == (1, 2)
            runner.gate.set()
            return list(await asyncio.gather(first, *others))

    responses = asyncio.run(ask_five())
    assert sorted(response.status_code for response in responses) == [200, 200, 200, 429, 429]
    refused = next(response for response in responses if response.status_code == 429)
    assert refused.headers["Retry-After"] == "1"
    assert refused.json()["error"]["type"] == "QueueFullError"


def test_a_client_that_leaves_stops_the_work(serving: Callable[..., TestClient]) -> None:
    runner = CancellableRunner()
    runner.gate.clear()
    app = serving(runner).app
    messages = [
        {"type": "http.request", "body": b'{"text": "a"}', "more_body": False},
        {"type": "http.disconnect"},
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        if len(messages) == 1:
            await asyncio.to_thread(runner.started.wait, LONG_S)
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": headers}
    asyncio.run(app({**scope, "query_string": b""}, receive, send))  # type: ignore[arg-type]
    assert runner.was_cancelled.wait(LONG_S)
    assert sent[0]["status"] == 499


def test_stopping_unloads_and_starting_again_works() -> None:
    runner = EchoRunner()
    host = RunnerHost(lambda: runner)
    client = TestClient(create_app(Served(host, INFO)))
    for _ in range(2):
        host.start()
        wait_for(lambda: host.status == "healthy")
        assert client.post("/predict", json={"text": "a"}).status_code == 200
        host.stop()
        assert not runner.is_loaded
        assert client.post("/predict", json={"text": "a"}).status_code == 503


def test_a_damaged_model_is_named_by_its_class(serving: Callable[..., TestClient]) -> None:
    client = serving(EchoRunner(load_error=IntegrityError("model.safetensors was changed")))
    error = client.get("/health").json()["error"]
    assert error == {"type": "IntegrityError", "message": "model.safetensors was changed"}


def test_a_runner_that_leaves_while_loading_is_a_failure() -> None:
    def leave() -> EchoRunner:
        raise SystemExit("no weights here")

    failures: list[Exception] = []
    host = RunnerHost(leave, on_failure=failures.append)
    host.start()
    wait_for(lambda: failures)
    assert host.status == "unhealthy"
    assert "SystemExit: no weights here" in str(failures[0])
    host.stop()


def test_what_a_runner_does_not_know_hides_nothing(serving: Callable[..., TestClient]) -> None:
    class Describing(EchoRunner):
        def describe(self) -> dict[str, Any]:
            return {"model_tag": None, "architecture": "llama"}

    info = ServiceInfo("my_service", "my_project", "mlx", model_tag="stored:1.0.0")
    health = serving(Describing(), info).get("/health").json()
    assert (health["model_tag"], health["architecture"]) == ("stored:1.0.0", "llama")
