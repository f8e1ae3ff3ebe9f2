"""A built Bento runs where the project's source has never been."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from serving_process import BENTOML, ServingProcess

from mlops.registry import ModelStore
from mlops.serving.bentoml.packager import package_model
from tiny_models import write_language_model, write_lora_adapter


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an empty virtual environment; `install` fills it from a Bento."""
    folder = tmp_path_factory.mktemp("elsewhere") / "venv"
    subprocess.run([_uv(), "venv", "--quiet", "--python", sys.executable, folder], check=True)
    return folder / "bin"


def _uv() -> str:
    uv = shutil.which("uv")
    if uv is None:
        pytest.fail("uv is not on PATH: run the tests with `make test`")
    return uv


def install(bento: Path, python: Path) -> None:
    """What the Bento's own install script does in a container, with uv."""
    environment = {**os.environ, "VIRTUAL_ENV": str(python.parent.parent)}
    wheels = [str(wheel) for wheel in (bento / "env" / "python" / "wheels").iterdir()]
    requirements = str(bento / "env" / "python" / "requirements.txt")
    subprocess.run(
        [_uv(), "pip", "install", "--quiet", "-r", requirements, *wheels],
        env=environment,
        check=True,
    )


def test_bento_serves_without_the_source(
    bentoml_home: Path, tmp_path: Path, elsewhere: Path
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_language_model(base)
    write_lora_adapter(adapter, base, base_reference=str(base))
    result = package_model(base, "demo", "support", adapters={"tone": adapter})
    shutil.rmtree(base)
    shutil.rmtree(adapter)
    install(bentoml_home / "bentos" / result["bento_tag"].replace(":", "/"), elsewhere / "python")
    empty = tmp_path / "empty"
    empty.mkdir()
    located = subprocess.run(
        [elsewhere / "python", "-c", "import mlops; print(mlops.__file__)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=empty,
    )
    assert str(elsewhere.parent) in located.stdout
    command = [str(elsewhere / "python"), "-m", "bentoml", "serve", result["bento_tag"]]
    with ServingProcess(command, empty, bentoml_home) as server:
        server.wait_until_ready()
        health = httpx.get(f"{server.url}/health").json()
        assert health["model_tag"] == result["model_tag"]
        assert health["digest"] == result["model_digest"]
        described = httpx.get(f"{server.url}/openapi.json").json()["info"]
        assert described["version"] == result["bento_tag"].partition(":")[2]
        body = {"text": "hello", "max_tokens": 8, "temperature": 0}
        plain = httpx.post(f"{server.url}/predict", json=body, timeout=60).json()
        tone = httpx.post(f"{server.url}/predict", json={**body, "adapter": "tone"}, timeout=60)
        assert plain["project_name"] == "support"
        assert plain["model_type"] == "mlx"
        assert tone.json()["adapter"] == "tone"
        unknown = httpx.post(f"{server.url}/predict", json={**body, "adapter": "nobody"})
        assert unknown.status_code == 404


def test_bento_with_a_flipped_byte_is_not_served(bentoml_home: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_language_model(base)
    result = package_model(base, "demo")
    weights = ModelStore().get(result["model_tag"]).path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(data)
    with ServingProcess([*BENTOML, "serve", result["bento_tag"]], tmp_path, bentoml_home) as server:
        assert server.wait() != 0
    assert "model.safetensors has changed since it was stored" in server.told()
