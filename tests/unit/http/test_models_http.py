from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from text_runner import LONG_S, ScriptedRunner
from text_service import INFO, Serve, serving_runners

from mlops.serving.http import RunnerHost, Served, ServiceInfo, create_app


class Described(ScriptedRunner):
    def __init__(self, **facts: Any) -> None:
        super().__init__()
        self.facts = facts

    def describe(self) -> dict[str, Any]:
        return self.facts


TWO_ADAPTERS = {
    "adapters": ["formal", "team/terse"],
    "adapter_tags": {"formal": "formal:2.0.0"},
    "default_adapter": None,
    "context_tokens": 1024,
}


@pytest.fixture
def serving() -> Iterator[Serve]:
    with serving_runners() as serve:
        yield serve


def cards(client: TestClient) -> list[tuple[Any, ...]]:
    body = client.get("/v1/models").json()
    assert body["object"] == "list"
    for card in body["data"]:
        assert card["object"] == "model"
        assert abs(card["created"] - time.time()) < LONG_S
        assert card["owned_by"] == "default"
    return [(card["id"], card["root"], card["parent"]) for card in body["data"]]


def test_a_base_and_its_adapters(serving: Serve) -> None:
    client = serving(Described(**TWO_ADAPTERS))
    assert cards(client) == [
        ("my_model", "my_model:1.0.0", None),
        ("formal", "formal:2.0.0", "my_model"),
        ("team/terse", "team/terse", "my_model"),
    ]
    lengths = [card["max_model_len"] for card in client.get("/v1/models").json()["data"]]
    assert lengths == [1024] * 3


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("my_model", "my_model"),
        ("my_model:1.0.0", "my_model"),
        ("my_service", "my_model"),
        ("models/my_model", "my_model"),
        ("base", "my_model"),
        ("base:base", "my_model"),
        ("formal", "formal"),
        ("base:formal", "formal"),
        ("my_service:formal", "formal"),
        ("team/terse", "team/terse"),
        ("team%2Fterse", "team/terse"),
        ("nobody", None),
        ("my_model:2.0.0", None),
        ("", None),
        ("x" * 10_000, None),
    ],
)
def test_one_of_them(serving: Serve, name: str, found: str | None) -> None:
    client = serving(Described(**TWO_ADAPTERS))
    response = client.get(f"/v1/models/{name}")
    if found is None:
        assert response.status_code == 404
        assert (
            response.json()["error"].items()
            >= {
                "type": "invalid_request_error",
                "param": "model",
                "code": "model_not_found",
            }.items()
        )
        assert len(response.text) < 1000
    else:
        assert response.status_code == 200
        listed = client.get("/v1/models").json()["data"]
        assert response.json() == next(card for card in listed if card["id"] == found)


def test_a_service_that_is_an_adapter(serving: Serve) -> None:
    facts = {**TWO_ADAPTERS, "adapters": ["my_model", "formal"], "default_adapter": "my_model"}
    client = serving(Described(**facts))
    assert cards(client) == [
        ("base", None, None),
        ("my_model", "my_model:1.0.0", "base"),
        ("formal", "formal:2.0.0", "base"),
    ]
    found = {"my_service": "my_model", "my_model": "my_model", "base": "base", "formal": "formal"}
    for name, identifier in found.items():
        assert client.get(f"/v1/models/{name}").json()["id"] == identifier


def test_no_path_of_the_machine_is_told(serving: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "my_weights"
    folder.mkdir()
    client = serving(Described(), info=ServiceInfo("my_service", model=str(folder)))
    assert cards(client) == [("my_service", "my_weights", None)]
    assert str(tmp_path) not in client.get("/v1/models").text
    client = serving(Described(), info=ServiceInfo("my_service", model="org/name"))
    assert cards(client) == [("my_service", "org/name", None)]


def test_adapters_come_and_go(serving: Serve) -> None:
    runner = Described(adapters=["a"])
    client = serving(runner)
    assert [one[0] for one in cards(client)] == ["my_model", "a"]
    runner.facts = {"adapters": ["b"]}
    assert [one[0] for one in cards(client)] == ["my_model", "b"]
    assert client.get("/v1/models/a").status_code == 404


def test_before_the_model_is_loaded_the_base_is_listed() -> None:
    may_load = threading.Event()

    def make() -> ScriptedRunner:
        may_load.wait(LONG_S)
        return Described(**TWO_ADAPTERS)

    host = RunnerHost(make)
    client = TestClient(create_app(Served(host, INFO)))
    host.start()
    try:
        assert cards(client) == [("my_model", "my_model:1.0.0", None)]
        assert client.get("/v1/models/formal").status_code == 404
    finally:
        may_load.set()
        host.stop()


def test_a_model_of_its_own_is_listed(serving: Serve) -> None:
    assert cards(serving(ScriptedRunner())) == [("my_model", "my_model:1.0.0", None)]
