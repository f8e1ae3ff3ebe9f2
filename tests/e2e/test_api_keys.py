from __future__ import annotations

from pathlib import Path

import bentoml
import httpx
import pytest
from serving_process import BENTOML, ServingProcess

from mlops.cli.asking import Service
from mlops.errors import ServiceError

KEY = "a-key-of-the-first-team"
SERVICE = """
from mlops.serving.bentoml.service import create_bentoml_service


class EchoRunner:
    def __init__(self, model_path):
        self.is_loaded = False

    def load_model(self):
        self.is_loaded = True

    def predict(self, input_data):
        return {"prediction": input_data["text"], "mlx_optimized": False, "model_type": "custom"}

    def predict_batch(self, inputs):
        return [self.predict(fields) for fields in inputs]

    def get_memory_usage(self):
        return {"total_mb": 1.0, "active_mb": 1.0, "cache_mb": 0.0, "mlx_available": False}

    def unload_model(self):
        self.is_loaded = False


svc = create_bentoml_service(
    "model", "my_service", model_type="custom", runner_class=EchoRunner,
    config={"http": {"api_key_file": "keys", "max_body_bytes": 100_000}},
)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    (folder / "model").mkdir(parents=True)
    (folder / "service.py").write_text(SERVICE)
    (folder / "keys").write_text(f"# one team\n{KEY}\n")
    return folder


def test_keys_under_bentoml(project: Path, tmp_path: Path) -> None:
    # From another folder: the file is named from where the service is.
    command = (*BENTOML, "serve", "service:svc", "--working-dir", str(project))
    serving = ServingProcess(command, tmp_path, tmp_path / "home")
    with serving, httpx.Client(base_url=serving.url, trust_env=False) as ask:
        serving.wait_until_ready()
        assert ask.get("/health").status_code == 200
        assert ask.get("/metrics").status_code == 401
        assert ask.post("/predict", json={"text": "a"}).status_code == 401
        keys = {"Authorization": f"Bearer {KEY}"}
        answered = ask.post("/predict", json={"text": "a"}, headers=keys)
        assert answered.json()["prediction"] == "a"

        with bentoml.SyncHTTPClient(serving.url, token=KEY) as client:
            assert client.predict(text="b")["prediction"] == "b"
            client._temp_dir.cleanup()  # BentoML leaves that to the garbage collector

        address = serving.url.removeprefix("http://")
        answer = Service(address, 60, f"{KEY}\n").predict({"text": "c"})
        assert answer["prediction"] == "c"
        with pytest.raises(ServiceError, match="--api-key or MLOPS_API_KEY"):
            Service(serving.url, 60).predict({"text": "c"})

        # The refusal of a body that is too large arrives, however much is sent.
        for size in (100_001, 20_000_000):
            refused = ask.post("/predict", json={"text": "x" * size}, headers=keys)
            assert refused.status_code == 413
        assert ask.get("/health").status_code == 200
        assert serving.stop() == 0
    assert KEY not in serving.told()


def test_bad_keys_end_the_command_at_once(project: Path, tmp_path: Path) -> None:
    (project / "keys").write_text("too-short\n")
    serving = ServingProcess((*BENTOML, "serve", "service:svc"), project, tmp_path / "home")
    with serving:
        assert serving.wait() != 0
    assert "line 1: an API key has at least 16 characters" in serving.told()
    assert "too-short" not in serving.told()
    assert "Traceback" not in serving.told()
