"""Which files `--reload` counts as the service's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tiny_models
from mlops.serving.bentoml.packager import package_model
from mlops.serving.bentoml.sources import Sources

SERVICE = """
from pathlib import Path

from mlops.serving.bentoml.service import create_bentoml_service
from voices import NAME

Path("settings.yaml").read_text()
with Path("app.log").open("a") as log:
    log.write("imported")
Path("state.json").write_text("{}")
Path("state.json").read_text()
print("what a service prints")

svc = create_bentoml_service("tiny", NAME, adapters={"formal": "formal"})
"""


def test_code_settings_model_and_adapters(bentoml_home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    base = tiny_models.write_language_model(tmp_path / "base")
    package_model(base, "tiny", model_version="1.0.0", build_bento=False)
    adapter = tiny_models.write_lora_adapter(folder / "formal", base)
    (adapter / "training.log").write_text("…")
    (folder / "voices").mkdir()
    (folder / "voices" / "__init__.py").write_text("NAME = 'tiny'")
    (folder / "service.py").write_text(SERVICE)
    (folder / "settings.yaml").write_text("a: 1")
    (folder / "unused.py").write_text("")

    sources = find(folder)
    assert sources.error is None
    assert sources.name == "tiny"
    own = {Path(file).relative_to(folder) for file in sources.code if file.startswith(str(folder))}
    assert set(map(str, own)) == {"service.py", "settings.yaml", "voices/__init__.py"}
    files = set(sources.files())
    latest = bentoml_home / "models" / "tiny" / "latest"
    assert {latest, adapter / "adapters.safetensors", adapter / "adapter_config.json"} <= files
    assert latest.with_name("1.0.0") / "model.safetensors" in files
    assert not {file for file in files if file.suffix == ".log"}


def test_what_may_mend_a_service(tmp_path: Path) -> None:
    (tmp_path / "service.py").write_text("import one\n")
    (tmp_path / "one.py").write_text("\nimport far.away\n")
    sources = find(tmp_path)
    assert sources.error == "one.py, line 2: ModuleNotFoundError: No module named 'far'"
    wanted = {"service.py", "one.py", "far.py", "far/__init__.py"}
    assert {str(tmp_path / name) for name in wanted} <= set(sources.code)


def find(folder: Path) -> Sources:
    command = [sys.executable, "-W", "ignore", "-m", "mlops.serving.bentoml.sources"]
    command += ["service:svc", ""]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return Sources.from_json(done.stdout)
