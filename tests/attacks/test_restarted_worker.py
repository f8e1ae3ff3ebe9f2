"""A worker is killed: the next one serves what clients loaded, verified again, and nothing else."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.numpy import load_file, save_file
from serving_process import BENTOML, LONG_S, ServingProcess

import tiny_models
from bentoml_store import look_again
from mlops.serving.bentoml.packager import package_model

SERVICE = """
from mlops.serving.bentoml.service import create_bentoml_service

svc = create_bentoml_service(
    "model",
    service_name="tiny",
    adapters={"stays": "adapters/1", "unloaded": "adapters/2", "replaced": "adapters/3"},
    config={"http": {"enable_runtime_adapters": True, "adapter_folder": "adapters"}},
)
"""

LOADED = {"added": "4", "replaced": "5", "changed": "6", "deleted": "7", "fleeting": "8"}
SERVED = ("stays", "replaced", "added", "twice", "stored")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    base = tiny_models.write_language_model(folder / "model")
    for seed in range(1, 10):
        tiny_models.write_lora_adapter(folder / "adapters" / str(seed), base, seed=seed)
    (folder / "service.py").write_text(SERVICE)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServingProcess]:
    (folder / "tmp").mkdir()
    command = [*BENTOML, "serve", "service:svc"]
    home = folder / "home"
    with ServingProcess(command, folder, home, TMPDIR=str(folder / "tmp")) as server:
        package_adapter(folder, home)
        yield server.wait_until_ready()


def package_adapter(folder: Path, home: Path) -> None:
    """Put an adapter of the model into the store that the server has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENTOML_HOME", str(home))
        look_again()
        package_model(
            folder / "adapters" / "9",
            "stored",
            model_version="1.0.0",
            base_model=folder / "model",
            build_bento=False,
        )
    look_again()


def post(server: ServingProcess, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{path}", json=body, timeout=LONG_S, trust_env=False)


def load(server: ServingProcess, name: str, path: str, *, in_place: bool = False) -> None:
    body = {"lora_name": name, "lora_path": path, "load_inplace": in_place}
    answer = post(server, "load_lora_adapter", **body)
    assert answer.status_code == 200, answer.text


def unload(server: ServingProcess, name: str) -> int:
    return post(server, "unload_lora_adapter", lora_name=name).status_code


def text_of(server: ServingProcess, adapter: str) -> str:
    answer = post(
        server, "completions", model=adapter, prompt="Hello", max_tokens=12, temperature=0
    )
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def health(server: ServingProcess) -> Any:
    return httpx.get(f"{server.url}/health", timeout=LONG_S, trust_env=False).json()


def kill_the_worker(server: ServingProcess) -> None:
    """Kill it as the kernel does that wants its memory; returns when another is ready."""
    (worker,) = server.workers()
    worker.send_signal(signal.SIGKILL)
    give_up = time.monotonic() + LONG_S
    while [one.pid for one in server.workers()] in ([], [worker.pid]):
        assert time.monotonic() < give_up, server.told()
        time.sleep(0.05)
    server.wait_until_ready()


def change(adapter: Path) -> None:
    """Other weights that fit as well."""
    weights = adapter / "adapters.safetensors"
    tensors = {name: tensor * 2 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights)


def test_adapters_survive_their_worker(server: ServingProcess, folder: Path) -> None:
    for name, path in LOADED.items():
        load(server, name, path, in_place=name == "replaced")
    for path in ("8", "7", "1"):
        load(server, "twice", path, in_place=True)
    load(server, "stored", "stored:1.0.0")
    assert [unload(server, name) for name in ("fleeting", "unloaded")] == [200, 200]
    before = {name: text_of(server, name) for name in SERVED}
    assert text_of(server, "twice") == before["stays"]

    change(folder / "adapters" / "6")
    for gone in ("7", "2", "3"):  # 2 and 3 are configured, and no longer what is served
        shutil.rmtree(folder / "adapters" / gone)
    kill_the_worker(server)

    said = health(server)
    assert said["status"] == "healthy"
    assert sorted(said["adapters"]) == sorted(SERVED)
    assert {name: text_of(server, name) for name in SERVED} == before
    missing = said["missing_adapters"]
    assert "has changed" in missing["changed"]
    assert "is not there any more" in missing["deleted"]
    assert sorted(missing) == ["changed", "deleted"]
    assert str(folder) not in json.dumps(missing)
    for name in (*missing, "fleeting", "unloaded"):
        assert post(server, "completions", model=name, prompt="Hello").status_code == 404
    told = server.told()
    assert all(f"adapter '{name}' cannot be loaded again" in told for name in missing)


def test_what_is_missing_can_be_loaded_anew_or_forgotten(server: ServingProcess) -> None:
    load(server, "changed", "6")
    assert [unload(server, "deleted"), unload(server, "deleted")] == [200, 404]
    assert health(server).get("missing_adapters") is None
    changed = text_of(server, "changed")
    kill_the_worker(server)
    said = health(server)
    assert said.get("missing_adapters") is None
    assert sorted(said["adapters"]) == sorted((*SERVED, "changed"))
    assert text_of(server, "changed") == changed


def test_the_list_ends_with_the_server(server: ServingProcess, folder: Path) -> None:
    assert list((folder / "tmp").glob("mlops-serve-*/adapters-tiny.json"))
    assert server.stop() == 0
    assert not list((folder / "tmp").glob("mlops-serve-*"))


def test_several_workers_would_know_different_adapters(folder: Path) -> None:
    command = [*BENTOML, "serve", "service:svc", "--workers", "2"]
    with ServingProcess(command, folder, folder / "several") as server:
        assert server.wait() == 1
        assert "--workers must be 1" in server.told()
