from __future__ import annotations

import asyncio
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from echo_runner import EchoRunner
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.routing import Mount
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from mlops.errors import ConfigError
from mlops.serving.http import HTTPSettings, RunnerHost, Served, ServiceInfo, create_app
from mlops.serving.http import limits as limits_module
from mlops.serving.http.access import Access, guards, read_api_keys
from mlops.serving.http.limits import Limits
from mlops.serving.http.paths import handed_over, is_handed_over
from mlops.serving.http.records import RequestRecord

KEY = "a-key-of-the-first-team"
OTHER_KEY = "a-key-of-another-team"
WITH_KEYS = HTTPSettings(api_keys=(KEY, OTHER_KEY))
ORIGIN = "https://page.example"
ASK: dict[str, Any] = {"json": {"text": "a"}}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def serving() -> Iterator[Callable[..., TestClient]]:
    """Makes a client of a service with these settings, and of the app behind it."""
    hosts = []

    def serve(
        settings: HTTPSettings, inner: Starlette | None = None, limits: Limits | None = None
    ) -> TestClient:
        hosts.append(RunnerHost(EchoRunner))
        hosts[-1].start()
        served = Served(hosts[-1], ServiceInfo("s"), settings, limits=limits)
        return TestClient(create_app(served, inner=inner), raise_server_exceptions=False)

    yield serve
    for host in hosts:
        host.stop()


@pytest.fixture
def client(serving: Callable[..., TestClient]) -> TestClient:
    return serving(WITH_KEYS)


# Who may ask.


@pytest.mark.parametrize(
    "headers",
    [
        bearer(KEY),
        bearer(OTHER_KEY),
        {"authorization": f"bearer   {KEY} "},
        {"X-API-Key": KEY},
        {"X-API-Key": KEY, "Authorization": "Bearer of-a-proxy-in-front"},
        {"X-API-Key": KEY, "Authorization": "Basic dXNlcjpwYXNz"},
    ],
)
def test_a_key_lets_in(client: TestClient, headers: dict[str, str]) -> None:
    assert client.post("/predict", headers=headers, **ASK).status_code == 200


@pytest.mark.parametrize(
    ("headers", "challenge"),
    [
        ({}, "Bearer"),
        ({"Authorization": KEY}, "Bearer"),
        ({"Authorization": f"Basic {KEY}"}, "Bearer"),
        ({"Authorization": "Bearer"}, 'Bearer error="invalid_token"'),
        (bearer(KEY[:-1]), 'Bearer error="invalid_token"'),
        (bearer(KEY + "x"), 'Bearer error="invalid_token"'),
        (bearer(KEY.upper()), 'Bearer error="invalid_token"'),
        (bearer(f"{KEY},{OTHER_KEY}"), 'Bearer error="invalid_token"'),
        ({"X-API-Key": ""}, 'Bearer error="invalid_token"'),
        ({"X-API-Key": "x", **bearer(KEY)}, 'Bearer error="invalid_token"'),
        ({"Cookie": f"key={KEY}"}, "Bearer"),
    ],
)
def test_without_a_key_nobody_gets_in(
    client: TestClient, headers: dict[str, str], challenge: str
) -> None:
    response = client.post("/predict", headers=headers, **ASK)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == challenge
    assert response.json()["error"]["type"] == "Unauthorized"
    assert KEY[:8].lower() not in response.text.lower()


def test_openais_form_of_a_wrong_key(client: TestClient) -> None:
    error = client.get("/v1/models", headers=bearer("sk-wrong")).json()["error"]
    assert error.pop("message")
    assert error == {"type": "invalid_request_error", "param": None, "code": "invalid_api_key"}


def test_the_body_of_a_stranger_is_not_read(client: TestClient) -> None:
    async def ask() -> list[Any]:
        sent: list[Any] = []

        async def receive() -> Any:
            raise AssertionError("nobody should read this")

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/predict", "headers": []}
        await client.app({**scope, "query_string": b""}, receive, send)  # type: ignore[arg-type]
        return sent

    assert asyncio.run(ask())[0]["status"] == 401


OPEN = ("/health", "/livez", "/readyz", "/docs", "/docs.json", "/openapi.json")


@pytest.mark.parametrize("path", OPEN)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_probes_and_the_description_need_no_key(client: TestClient, method: str, path: str) -> None:
    assert client.request(method, path).status_code in {200, 503}


def test_what_the_docs_page_loads_needs_no_key(client: TestClient) -> None:
    links = [word.split('"')[1] for word in client.get("/docs").text.split() if "docs/" in word]
    assert links
    for link in links:
        assert client.get(f"/{link}").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "//health",
        "/health/",
        "/health//",
        "/./health",
        "/HEALTH",
        "/health ",
        "/health\x00",
        "/health\u2215",
        "/health;x",
        "/health/../predict",
        "/docs/../predict",
        "/docs/",
        "/docs/other",
        "/metrics",
        "/metrics/prometheus",
        "/schema.json",
        "/",
        "",
        "health",
        "/nowhere",
        "/v1/models",
    ],
)
def test_there_is_no_way_round(client: TestClient, path: str) -> None:
    assert asyncio.run(status_of(client, "GET", path)) == 401


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "get", "BREW"])
@pytest.mark.parametrize("path", ["/health", "/docs"])
def test_open_paths_are_for_reading(client: TestClient, method: str, path: str) -> None:
    assert asyncio.run(status_of(client, method, path)) == 401


async def status_of(
    client: TestClient, method: str, path: str, *, headers: Any = (), **scope: Any
) -> int:
    """With the path as it is: a client would tidy it up."""
    statuses = []
    unread = [{"type": "http.request", "body": b'{"text": "a"}', "more_body": False}]

    async def receive() -> Any:
        return unread.pop() if unread else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    asked = {"type": "http", "method": method, "path": path, "headers": list(headers)}
    await client.app({**asked, "query_string": b"", **scope}, receive, send)  # type: ignore[arg-type]
    return int(statuses[0])


JSON_HEADER = (b"content-type", b"application/json")


def test_what_another_replica_has_let_in_needs_no_key(serving: Callable[..., TestClient]) -> None:
    client = serving(HTTPSettings(api_keys=(KEY,), requests_per_minute=1))
    told = handed_over({"type": "http", "method": "POST", "path": "/predict", "headers": []})
    assert is_handed_over(told)
    told |= {"query_string": b"", "headers": [JSON_HEADER]}
    for _ in range(3):
        assert asyncio.run(status_of(client, **told)) == 200
    asked = asyncio.run(status_of(client, "POST", "/predict", headers=[JSON_HEADER]))
    assert asked == 401


@pytest.mark.parametrize("name", ["mlops.handed_over", "mlops-handed-over", "mlops_handed_over"])
@pytest.mark.parametrize("value", ["true", "1", "{}"])
def test_no_client_can_say_that_it_was_let_in(client: TestClient, name: str, value: str) -> None:
    response = client.post(
        f"/predict?{name}={value}",
        headers={name: value, "Cookie": f"{name}={value}"},
        json={"text": "a", name: True},
    )
    assert response.status_code == 401


@given(st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=40)), max_size=5))
def test_no_header_makes_a_request_one_that_was_let_in(headers: list[tuple[bytes, bytes]]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("let in")

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": headers}
    assert not is_handed_over(scope)
    with pytest.raises(HTTPException) as refused:
        asyncio.run(Access(app, WITH_KEYS)(scope, None, None))  # type: ignore[arg-type]
    assert refused.value.status_code == 401


def test_another_replica_is_told_plain_values_only(client: TestClient) -> None:
    scope = {
        **{"type": "http", "http_version": "1.1", "method": "POST", "scheme": "https"},
        **{"path": "/a/predict", "raw_path": b"/a/predict", "root_path": "/a"},
        **{"query_string": b"x=1", "headers": [JSON_HEADER], "client": ("192.0.2.7", 5)},
        "server": ("127.0.0.1", 80),
    }
    inside = {"app": client.app, "state": {}, "router": object(), "mlops.record": object()}
    told = pickle.loads(pickle.dumps(handed_over({**scope, **inside})))  # noqa: S301
    assert {name: told.pop(name) for name in scope} == scope
    assert len(told) == 1  # the mark


def test_what_others_add_is_not_open(serving: Callable[..., TestClient]) -> None:
    async def users_own(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse(f"secrets {scope['path']}")(scope, receive, send)

    inner = Starlette(routes=[Mount("/", app=users_own)])
    client = serving(HTTPSettings(api_keys=(KEY,), enable_docs=False), inner)
    for path in (
        "/",
        "/docs",
        "/docs.json",
        "/openapi.json",
        "/docs/start.js",
        "/static_content/a",
    ):
        assert client.get(path).status_code == 401
        assert "secrets" in client.get(path, headers=bearer(KEY)).text
    assert "secrets" not in client.post("/health").text


def test_behind_a_prefix(serving: Callable[..., TestClient]) -> None:
    client = TestClient(serving(WITH_KEYS).app, root_path="/prefix")
    assert client.get("/prefix/livez").status_code == 200
    assert client.get("/prefix/predict").status_code == 401
    assert client.get("/prefix/prefix/livez").status_code == 401


@pytest.mark.parametrize("headers", [{}, bearer(KEY)])
def test_a_websocket_needs_a_key_too(headers: dict[str, str]) -> None:
    reached, sent = [], []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append(scope["path"])

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "websocket", "path": "/health", "headers": raw}
    asyncio.run(Access(app, WITH_KEYS)(scope, None, send))  # type: ignore[arg-type]
    if headers:
        assert reached == ["/health"]
    else:
        assert not reached
        assert (sent[0]["type"], sent[0]["code"]) == ("websocket.close", 1008)


def test_the_record_knows_the_key_by_its_fingerprint() -> None:
    assert asyncio.run(_client_of(WITH_KEYS, [(b"x-api-key", KEY.encode())])) == "key-5d191d9b"


@pytest.mark.parametrize(
    ("client", "name"),
    [
        (("192.0.2.7", 5), "192.0.2.7"),
        (("2001:db8:1:2:3:4:5:6", 5), "2001:db8:1:2::/64"),
        (("::ffff:192.0.2.7", 5), "192.0.2.7"),
        (("fe80::1%eth0", 5), "fe80::/64"),
        (("not:an:address", 5), "not:an:address"),
        (None, "unknown"),
    ],
)
def test_without_keys_a_client_is_an_address(client: Any, name: str) -> None:
    settings = HTTPSettings(requests_per_minute=1)
    spoofed = [(b"x-forwarded-for", b"198.51.100.1")]
    assert asyncio.run(_client_of(settings, spoofed, client)) == name


async def _client_of(settings: HTTPSettings, headers: list[Any], client: Any = None) -> str:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        pass

    record = RequestRecord("1")
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers, "client": client}
    record.put_into(scope)
    await Access(app, settings)(scope, None, None)  # type: ignore[arg-type]
    return record.client


def test_keys_are_nowhere_to_be_seen(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client.post("/predict", headers=bearer(KEY), json={"text": "crash"})
    client.post("/predict", headers=bearer("wrong-" + KEY), **ASK)
    shown = client.get("/health").text + caplog.text + repr(WITH_KEYS)
    assert KEY not in shown


def test_without_settings_only_names_are_looked_at() -> None:
    kinds = [one.cls.__name__ for one in guards(HTTPSettings())]  # type: ignore[attr-defined]
    assert kinds == ["Failures", "Hosts"]


# How much.


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def outcome(limits: Limits, name: str = "a") -> int | None:
    """None when a request is let in (and over at once), else the seconds to wait."""
    try:
        limits.leave(limits.enter(name))
    except HTTPException as refused:
        assert refused.status_code == 429
        return int((refused.headers or {})["Retry-After"])
    return None


def test_a_minutes_requests_at_once_and_then_the_rate() -> None:
    clock = Clock()
    limits = Limits(6, None, clock)
    assert [outcome(limits) for _ in range(8)] == [None] * 6 + [10, 10]
    clock.now_s += 4
    assert outcome(limits) == 6
    clock.now_s += 6
    assert [outcome(limits) for _ in range(2)] == [None, 10]
    assert outcome(limits, "somebody else") is None
    clock.now_s += 60
    assert [outcome(limits) for _ in range(7)] == [None] * 6 + [10]


@given(
    st.integers(1, 50),
    st.lists(st.floats(0, 30, allow_nan=False), max_size=300),
)
def test_no_minute_has_more_than_what_was_saved_and_what_came(
    per_minute: int, pauses_s: list[float]
) -> None:
    clock = Clock()
    limits = Limits(per_minute, None, clock)
    taken = []
    for pause_s in pauses_s:
        clock.now_s += pause_s
        waited = outcome(limits)
        if waited is None:
            taken.append(clock.now_s)
        else:
            clock.now_s += waited  # what a client is told is enough
            assert outcome(limits) is None
            taken.append(clock.now_s)
    for start in taken:
        assert sum(start <= one < start + 60 for one in taken) <= 2 * per_minute


@given(st.integers(1, 5), st.lists(st.sampled_from(["in", "out"]), max_size=60))
def test_requests_at_one_time(at_once: int, events: list[str]) -> None:
    limits = Limits(None, at_once)
    running = []
    for event in events:
        if event == "out" and running:
            limits.leave(running.pop())
        elif event == "in":
            try:
                running.append(limits.enter("a"))
            except HTTPException:
                assert len(running) == at_once
    assert len(running) <= at_once


def test_a_refused_request_counts_for_nothing() -> None:
    clock = Clock()
    limits = Limits(2, 1, clock)
    running = limits.enter("a")
    assert [outcome(limits) for _ in range(5)] == [1] * 5
    limits.leave(running)
    assert [outcome(limits) for _ in range(2)] == [None, 30]


def test_a_flood_of_addresses_costs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "MAX_CLIENTS", 50)
    limits = Limits(1, 2, Clock())
    slow = limits.enter("slow")
    for number in range(1000):
        outcome(limits, str(number))
    assert len(limits) <= 50
    assert outcome(limits, "slow") == 60  # still known: its request is still running
    limits.leave(slow)


def test_the_limits_are_each_keys_own(serving: Callable[..., TestClient]) -> None:
    client = serving(HTTPSettings(api_keys=(KEY, OTHER_KEY), requests_per_minute=2))
    statuses = [client.post("/predict", headers=bearer(KEY), **ASK).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    assert client.post("/predict", headers=bearer(OTHER_KEY), **ASK).status_code == 200
    assert client.post("/predict", headers=bearer("wrong"), **ASK).status_code == 401
    assert [client.get("/health").status_code for _ in range(5)] == [200] * 5


def test_what_a_limited_client_is_told(serving: Callable[..., TestClient]) -> None:
    client = serving(HTTPSettings(requests_per_minute=4))
    for _ in range(4):
        client.get("/v1/models")
    refused = client.get("/v1/models")
    wait_s = int(refused.headers["Retry-After"])
    assert 1 <= wait_s <= 15  # seconds may have gone by since the first of them
    assert refused.json()["error"] == {
        "message": f"you may send 4 requests a minute, which is the limit: try again in {wait_s} s",
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert client.post("/predict", **ASK).json()["error"]["type"] == "TooManyRequests"


def test_limits_can_be_changed_while_it_runs(serving: Callable[..., TestClient]) -> None:
    limits = Limits(None, None)
    client = serving(HTTPSettings(requests_per_minute=1), limits=limits)

    def statuses(number: int) -> list[int]:
        return [client.get("/v1/models").status_code for _ in range(number)]

    assert statuses(5) == [200] * 5  # the settings' limits are not asked
    limits.per_minute = 2
    assert statuses(3) == [200, 200, 429]
    limits.per_minute = None
    assert statuses(3) == [200] * 3
    limits.at_once = 1
    assert statuses(3) == [200] * 3
    running = limits.enter("testclient")
    assert statuses(1) == [429]
    limits.leave(running)
    limits.at_once = None
    assert statuses(1) == [200]


def test_a_lower_limit_counts_what_runs_already() -> None:
    limits = Limits(None, 3)
    running = [limits.enter("a") for _ in range(3)]
    limits.at_once = 1
    for one in running:
        assert outcome(limits) == 1
        limits.leave(one)
    assert outcome(limits) is None


@pytest.mark.parametrize("ending", ["answered", "failed", "left"])
def test_a_request_counts_until_it_ends(ending: str) -> None:
    async def scenario() -> None:
        gate = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await gate.wait()
            if ending == "failed":
                raise RuntimeError("no")

        guarded = Access(app, HTTPSettings(max_concurrent_requests=1))
        scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
        first = asyncio.create_task(guarded(scope, None, None))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        with pytest.raises(HTTPException) as refused:
            await guarded(scope, None, None)  # type: ignore[arg-type]
        assert refused.value.status_code == 429
        if ending == "left":
            first.cancel()
        else:
            gate.set()
        await asyncio.gather(first, return_exceptions=True)
        gate.set()
        if ending == "failed":
            with pytest.raises(RuntimeError):
                await guarded(scope, None, None)  # type: ignore[arg-type]
        else:
            await guarded(scope, None, None)  # type: ignore[arg-type]

    asyncio.run(scenario())


# Web pages of other origins.


def test_cors_is_off_by_default(client: TestClient) -> None:
    for response in (
        client.get("/health", headers={"Origin": ORIGIN}),
        client.options(
            "/predict", headers={"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
        ),
    ):
        assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("allowed", ["*", ORIGIN])
def test_a_browser_may_ask_before_it_sends_a_key(
    serving: Callable[..., TestClient], allowed: str
) -> None:
    settings = HTTPSettings(api_keys=(KEY,), requests_per_minute=1, cors_origins=(allowed,))
    client = serving(settings)
    asked = "authorization, content-type, x-stainless-lang, x-request-id"
    for _ in range(3):
        response = client.options(
            "/v1/chat/completions",
            headers={
                "Origin": ORIGIN,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": asked,
            },
        )
        assert response.status_code == 200
        assert response.headers["Access-Control-Allow-Origin"] == allowed
        assert response.headers["Access-Control-Allow-Headers"] == asked
        assert "Access-Control-Allow-Credentials" not in response.headers


def test_another_origin_is_not_let_in(serving: Callable[..., TestClient]) -> None:
    client = serving(HTTPSettings(cors_origins=(ORIGIN,)))
    other = {"Origin": "https://page.example.evil", "Access-Control-Request-Method": "POST"}
    assert client.options("/predict", headers=other).status_code == 400
    response = client.get("/health", headers=other)
    assert "Access-Control-Allow-Origin" not in response.headers
    assert response.headers["Vary"] == "Origin"


def test_a_page_can_read_every_error(serving: Callable[..., TestClient]) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("inside")

    settings = HTTPSettings(api_keys=(KEY,), requests_per_minute=3, cors_origins=(ORIGIN,))
    client = serving(settings, Starlette(routes=[Mount("/broken", app=broken)]))
    asks = [
        (401, client.get("/broken/a", headers={"Origin": ORIGIN})),
        (500, client.get("/broken/a", headers={"Origin": ORIGIN, **bearer(KEY)})),
        (404, client.get("/nowhere", headers={"Origin": ORIGIN, **bearer(KEY)})),
        (405, client.get("/predict", headers={"Origin": ORIGIN, **bearer(KEY)})),
        (429, client.get("/nowhere", headers={"Origin": ORIGIN, **bearer(KEY)})),
    ]
    for status, response in asks:
        assert response.status_code == status
        assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert response.headers["Access-Control-Expose-Headers"] == "X-Request-Id, Retry-After"
        assert response.json()["error"]["message"]


# Where keys come from.


def test_keys_of_a_file_and_of_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(f"\ufeff# teams\r\n{KEY}\r\n\r\n  {OTHER_KEY}  \r\n".encode())
    file.chmod(0o600)
    environ = {"MLOPS_API_KEYS": f" {KEY}, a-key-of-the-environment,"}
    found = read_api_keys(str(file), environ)
    assert found == (KEY, "a-key-of-the-environment", OTHER_KEY)
    assert read_api_keys(None, {}) == ()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "holds no API key"),
        (b"# nothing yet\n\n", "holds no API key"),
        (b"fifteen-letters\n", "at least 16 characters, this one has 15"),
        (f"{KEY}\nwith a space in the middle\n".encode(), "line 2"),
        (f"{KEY}\x07bell\n".encode(), "visible ASCII"),
        ("schlüssel-mit-umlauten\n".encode(), "visible ASCII"),
        (b"\xff\xfe" + KEY.encode(), "not UTF-8"),
        (b"#" * (1024 * 1024 + 1), "over 1048576 bytes"),
        (b"\n".join(b"%020d" % number for number in range(1001)), "at most 1000"),
    ],
)
def test_a_file_that_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as refused:
        read_api_keys(str(file), {})
    for line in content.split()[:10]:
        assert len(line) < 5 or line.decode("latin-1") not in str(refused.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in [
        (tmp_path / "missing", "No such file"),
        (tmp_path, "not a file"),
        (tmp_path / "pipe", "not a file"),
        (Path("/dev/zero"), "not a file"),
    ]:
        with pytest.raises(ConfigError, match=reason):
            read_api_keys(str(path), {})


@pytest.mark.parametrize("written", ["", " , ", "short", f"{KEY},short"])
def test_a_variable_without_a_good_key_opens_no_door(written: str) -> None:
    with pytest.raises(ConfigError, match="MLOPS_API_KEYS") as refused:
        read_api_keys(None, {"MLOPS_API_KEYS": written})
    assert "short" not in str(refused.value)


@pytest.mark.parametrize(("mode", "warns"), [(0o600, False), (0o640, True), (0o644, True)])
def test_a_file_that_others_can_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warns: bool
) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY)
    file.chmod(mode)
    read_api_keys(str(file), {})
    assert ("others on this machine" in caplog.text) is warns
    assert KEY not in caplog.text
