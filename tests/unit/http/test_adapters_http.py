"""Adapters at run time as vLLM's clients know it; where they may come from, and where not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from echo_runner import EchoRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from text_runner import LONG_S, ScriptedRunner

from mlops.errors import (
    AdapterNotFoundError,
    EngineError,
    InvalidRequestError,
    MLOpsError,
    PackagingError,
)
from mlops.serving.http import HTTPSettings, RunnerHost, Served, ServiceInfo, create_app
from mlops.serving.http.adapters import find_adapter

INFO = ServiceInfo("my_service", model_tag="my_model:1.0.0")
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
Serve = Callable[..., TestClient]


class ChangingRunner(ScriptedRunner):
    """Remembers its adapters; fails to add one with `error`."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error
        self.paths: dict[str, Any] = {"made_from": "somewhere"}
        self.open = threading.Event()
        self.open.set()
        self.num_changing = self.most_changing = 0

    @property
    def adapter_names(self) -> tuple[str, ...]:
        return tuple(self.paths)

    def add_adapter(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        self.num_changing += 1
        self.most_changing = max(self.most_changing, self.num_changing)
        self.open.wait(LONG_S)
        self.num_changing -= 1
        if self.error:
            raise self.error
        assert replace or name not in self.paths
        self.paths[name] = path

    def remove_adapter(self, name: str) -> None:
        if name == "made_from":
            raise InvalidRequestError("it stays", "name")
        if name not in self.paths:
            raise AdapterNotFoundError("no such adapter")
        del self.paths[name]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What clients may load from; beside it is what they may not."""
    for name in ("allowed/formal", "allowed/deep/er", "secret/formal", "allowed-too/formal"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "allowed" / "file.json").write_text("{}")
    (tmp_path / "allowed" / "out").symlink_to(tmp_path / "secret")
    (tmp_path / "allowed" / "up").symlink_to(tmp_path)
    (tmp_path / "allowed" / "in").symlink_to(tmp_path / "allowed" / "formal")
    (tmp_path / "allowed" / "loop").symlink_to(tmp_path / "allowed" / "loop")
    return tmp_path / "allowed"


@pytest.fixture
def serving(folder: Path) -> Iterator[Serve]:
    hosts: list[RunnerHost] = []

    def serve(runner: EchoRunner, *, is_enabled: bool = True) -> TestClient:
        host = RunnerHost(lambda: runner)
        hosts.append(host)
        host.start()
        host._loading_ended.result(LONG_S)
        settings = HTTPSettings(enable_runtime_adapters=is_enabled, adapter_folder=folder)
        return TestClient(create_app(Served(host, INFO, settings)), raise_server_exceptions=False)

    yield serve
    for host in hosts:
        host.stop()


def load(client: TestClient, name: Any = "formal", path: Any = "formal", **fields: Any) -> Any:
    return client.post(LOAD, json={"lora_name": name, "lora_path": path, **fields})


def test_it_comes_and_goes(serving: Serve, folder: Path) -> None:
    runner = ChangingRunner()
    client = serving(runner)
    added = load(client, load_inplace=None)
    assert added.status_code == 200
    assert added.text == "Success: LoRA adapter 'formal' added successfully."
    assert runner.paths["formal"] == folder / "formal"
    again = load(client)
    assert again.status_code == 400
    assert "has already been loaded" in again.json()["error"]["message"]
    assert load(client, path=str(folder / "in"), load_inplace=True).status_code == 200
    removed = client.post(UNLOAD, json={"lora_name": "formal", "lora_int_id": None})
    assert removed.status_code == 200
    assert removed.text == "Success: LoRA adapter 'formal' removed successfully."
    gone = client.post(UNLOAD, json={"lora_name": "formal"})
    assert gone.status_code == 404
    assert "'formal' cannot be found" in gone.json()["error"]["message"]


def test_off_unless_the_operator_turns_it_on(serving: Serve) -> None:
    client = serving(ChangingRunner(), is_enabled=False)
    for route in (LOAD, UNLOAD):
        response = client.post(route, json={"lora_name": "x", "lora_path": "y"})
        assert response.status_code == 404
        assert "enable_runtime_adapters" in response.json()["error"]["message"]


def test_what_the_service_was_made_from_stays(serving: Serve) -> None:
    response = serving(ChangingRunner()).post(UNLOAD, json={"lora_name": "made_from"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "lora_name"


def test_a_model_without_adapters(serving: Serve) -> None:
    for runner in (EchoRunner(), ScriptedRunner()):
        response = load(serving(runner))
        assert response.status_code == 400
        assert "takes no adapters" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "lora_name"),
        ({"lora_name": "x"}, "lora_path"),
        ({"lora_path": "x"}, "lora_name"),
        ({"lora_name": "", "lora_path": "x"}, "lora_name"),
        ({"lora_name": "x", "lora_path": ""}, "lora_path"),
        ({"lora_name": 3, "lora_path": "x"}, "lora_name"),
        ({"lora_name": "x", "lora_path": ["x"]}, "lora_path"),
        ({"lora_name": "x", "lora_path": "x", "load_inplace": "yes"}, "load_inplace"),
        ({"lora_name": "x", "lora_path": "x", "is_3d_lora_weight": True}, "is_3d_lora_weight"),
    ],
)
def test_a_wrong_field_is_named(serving: Serve, body: Any, field: str) -> None:
    response = serving(ChangingRunner()).post(LOAD, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


def test_an_id_cannot_be_given(serving: Serve) -> None:
    response = serving(ChangingRunner()).post(UNLOAD, json={"lora_name": "x", "lora_int_id": 1})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "lora_int_id"


@pytest.mark.parametrize(
    "name",
    [
        *("base", "my_service", "my_model", "my_model:1.0.0", "base:x", "my_service:x"),
        *("x" * 129, "a\nb", "a\x00b", " x", "x ", "\u202e"),
    ],
)
def test_names_that_cannot_be(serving: Serve, name: str) -> None:
    runner = ChangingRunner()
    response = load(serving(runner), name)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "lora_name"
    assert runner.adapter_names == ("made_from",)


@pytest.mark.parametrize(
    "path",
    [
        *("../secret/formal", "formal/../../secret/formal", "..", ".", "./", "/", "deep/../formal"),
        *(
            "out",
            "out/formal",
            "up/secret/formal",
            "up",
            "loop",
            "file.json",
            "nothing",
            "~",
            "~/x",
        ),
        *("/etc", "/etc/passwd", "//etc", "file:///etc", "\\..\\secret", "%2e%2e/secret"),
        *("org/name", "org/name@main", "https://example.com/x", "hf://org/name"),
        *("s3://bucket/x", "name:version:more", "Name", "name@sha256:xyz", "x" * 2000, "a\x00b"),
        *("formal\n", "/proc/self/cwd", "x/" * 500, "e" * 300),
    ],
)
def test_nothing_else_is_loaded(
    serving: Serve, bentoml_home: Path, path: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.chdir(folder.parent / "secret")  # nor what is beside the process
    runner = ChangingRunner()
    response = load(serving(runner), path=path)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "lora_path"
    assert response.json()["error"]["message"].startswith("lora_path must be ")
    assert str(folder.parent) not in response.text.replace(path, "")
    assert runner.adapter_names == ("made_from",)


@pytest.mark.parametrize("name", ["secret/formal", "allowed-too/formal", "allowed/out/formal"])
def test_absolute_paths_lead_nowhere_else(serving: Serve, folder: Path, name: str) -> None:
    assert load(serving(ChangingRunner()), path=str(folder.parent / name)).status_code == 400


def test_a_folder_that_is_itself_a_link(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    for path in ("formal", str(link / "formal"), str(folder / "formal")):
        assert find_adapter(path, link) == folder / "formal"
    assert find_adapter("deep/er", link) == folder / "deep" / "er"


def test_without_a_folder_there_is_the_store_only(folder: Path, bentoml_home: Path) -> None:
    for path in (str(folder / "formal"), "."):
        with pytest.raises(InvalidRequestError, match="must be a tag"):
            find_adapter(path, None)
    with pytest.raises(InvalidRequestError, match="'nothing:1.0.0' is not"):
        find_adapter("nothing:1.0.0", None)


def test_a_name_in_the_working_directory_is_not_a_tag(
    tmp_path: Path, bentoml_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "formal").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidRequestError, match="'formal' is not"):
        find_adapter("formal", None)


@pytest.mark.parametrize(
    "error",
    [
        PackagingError("the adapter /srv/models/x belongs to another base than '/data/b/c'"),
        EngineError("the adapter takes 9 MiB; there are 3 MiB for adapters"),
        MLOpsError("/srv/models/x is no adapter"),
    ],
)
def test_the_reason_is_told_and_no_path(serving: Serve, error: Exception) -> None:
    response = load(serving(ChangingRunner(error)))
    assert response.status_code == 400
    assert "adapter" in response.text
    assert "/srv" not in response.text
    assert "/data" not in response.text


def test_two_loads_of_one_name(serving: Serve) -> None:
    runner = ChangingRunner()
    runner.open.clear()
    client = serving(runner)
    with client, ThreadPoolExecutor(8) as threads:  # one event loop for all
        answers = [threads.submit(load, client) for _ in range(8)]
        runner.open.set()
        statuses = sorted(answer.result(LONG_S).status_code for answer in answers)
    assert statuses == [200] + 7 * [400]
    assert runner.most_changing == 1


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # nothing is written there
)
@given(path=st.text(st.sampled_from("a./~:@\\%\x00é"), min_size=1, max_size=20))
def test_no_path_leads_out(path: str, bentoml_home: Path) -> None:
    root = bentoml_home.parent / "fuzzed"
    (root / "a" / "a").mkdir(parents=True, exist_ok=True)
    try:
        found = find_adapter(path, root / "a")
    except MLOpsError:
        return
    assert found == root / "a" / "a"
