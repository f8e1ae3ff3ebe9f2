"""`make wheel`, and its first minutes in an environment that holds no source of ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel() -> Path:
    done = run(["make", "--silent", "wheel"], REPOSITORY)
    return REPOSITORY / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel, and with the dependencies of this one."""
    environment = tmp_path_factory.mktemp("elsewhere") / "env"
    uv = shutil.which("uv") or str(REPOSITORY / ".tools/bin/uv")
    run([uv, "venv", "--quiet", "--python", sys.executable, environment], REPOSITORY)
    python = environment / "bin" / "python"
    install = [uv, "pip", "install", "--quiet", "--offline", "--no-deps", "--python", python, wheel]
    run(install, REPOSITORY)
    [site] = environment.glob("lib/python3*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def run(
    command: list[str | Path], folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"mlops", "mlx_mlops"}
    for name in ("demo/base_model/model.safetensors", "hardware/blas_shim.c", "py.typed"):
        assert f"mlops/{name}" in names


def test_an_installed_wheel_packages_the_demos_model(commands: Path, tmp_path: Path) -> None:
    home = {"BENTOML_HOME": str(tmp_path / "bentoml")}
    code = "import mlops; print(mlops.__path__[0])"
    package = Path(run([commands / "python", "-c", code], tmp_path).stdout.strip())
    assert package.is_relative_to(commands.parent)
    model = package / "demo" / "base_model"
    done = run(
        [commands / "mlops", "package", model, "--name", "first", "--json"], tmp_path, **home
    )
    result = json.loads(done.stdout)
    name, _, version = result["bento_tag"].partition(":")
    wheels = tmp_path / "bentoml" / "bentos" / name / version / "env" / "python" / "wheels"
    [inside] = wheels.iterdir()
    installed = {path.name for path in package.rglob("*.py")}
    assert installed == {
        Path(entry).name for entry in zipfile.ZipFile(inside).namelist() if entry.endswith(".py")
    }
    run([commands / "mlops", "models", "show", "first", "--verify"], tmp_path, **home)
