from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serving_process import BENTOML, LONG_S, MLOPS, ServingProcess, free_port

SERVICE = """
import os

from mlops.errors import ServiceError
from mlops.serving.bentoml.service import create_bentoml_service

PREFIX = "first"


class EchoRunner:
    def __init__(self, model_path):
        self.is_loaded = False

    def load_model(self):
        if os.environ.get("LOADING") == "fails":
            raise ServiceError("the weights are not for this model: package it again")
        if os.environ.get("LOADING") == "dies":
            os._exit(9)
        self.is_loaded = True

    def predict(self, input_data):
        return {"prediction": PREFIX + " " + str(input_data.get("text")), "mlx_optimized": False,
                "model_type": "custom"}

    def predict_batch(self, inputs):
        return [self.predict(fields) for fields in inputs]

    def get_memory_usage(self):
        return {"total_mb": 1.0, "active_mb": 1.0, "cache_mb": 0.0, "mlx_available": False}

    def unload_model(self):
        self.is_loaded = False


svc = create_bentoml_service(
    "model", "my_service", "my_project", model_type="custom", runner_class=EchoRunner
)
"""

PLAIN_SERVICE = """
import bentoml


@bentoml.service
class Plain:
    @bentoml.api
    def shout(self, text: str) -> str:
        return text.upper()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "service.py").write_text(SERVICE)
    (folder / "plain.py").write_text(PLAIN_SERVICE)
    (folder / "model").mkdir()
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServingProcess]:
    """`bentoml serve service:svc --workers 2`, as the guide types it."""
    command = [*BENTOML, "serve", "service:svc", "--workers", "2"]
    with ServingProcess(command, folder, folder / "home") as server:
        yield server.wait_until_ready()


def get(server: ServingProcess, path: str, **arguments: Any) -> httpx.Response:
    return httpx.get(f"{server.url}{path}", timeout=LONG_S, trust_env=False, **arguments)


def post(server: ServingProcess, **arguments: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/predict", timeout=LONG_S, trust_env=False, **arguments)


def bentoml_command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*BENTOML, *arguments],
        cwd=folder,
        env={
            **os.environ,
            "BENTOML_HOME": str(folder / "home"),
            "BENTOML_DO_NOT_TRACK": "True",
        },
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )


def test_the_guides_endpoints(server: ServingProcess) -> None:
    names = {"service_name": "my_service", "project_name": "my_project"}
    answer = post(server, json={"text": "hello", "max_tokens": 100, "temperature": 0.7}).json()
    assert answer == {
        "prediction": "first hello",
        "mlx_optimized": False,
        "model_type": "custom",
        **names,
    }
    health = get(server, "/health").json()
    assert (
        health.items()
        >= {
            "status": "healthy",
            **names,
            "model_loaded": True,
            "memory_usage_mb": 1.0,
            "mlx_available": False,
        }.items()
    )
    metrics = get(server, "/metrics").json()
    assert metrics.items() >= {**names, "model_loaded": True}.items()
    assert metrics["memory_usage"]["total_mb"] == 1.0
    scraped = get(server, "/metrics", headers={"accept": "text/plain"}).text
    assert 'route="/predict"' in scraped


def test_bentomls_own_routes(server: ServingProcess) -> None:
    assert get(server, "/livez").status_code == 200
    assert "/predict" in get(server, "/docs.json").json()["paths"]
    home = get(server, "/")
    assert (home.status_code, home.headers["location"]) == (307, "/docs")
    assert get(server, "/docs").status_code == 200


def test_bentomls_own_client(server: ServingProcess) -> None:
    import bentoml
    from bentoml.exceptions import BentoMLException

    with bentoml.SyncHTTPClient(server.url) as client:
        assert client.predict(text="hello")["prediction"] == "first hello"
        with pytest.raises((BentoMLException, TypeError)):
            client.predict(nonsense=1)
        client._temp_dir.cleanup()  # BentoML leaves that to the garbage collector, with a warning


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"{", "application/json", 400),
        (b'{"text": NaN}', "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b'{"a":' * 50_000, "application/json", 400),
        (b"\x80\x04K\x01.", "application/vnd.bentoml+pickle", 415),
        (b"a=b", "application/x-www-form-urlencoded", 415),
        (b" " * (5 << 20), "application/json", 413),
    ],
)
def test_hostile_bodies(
    server: ServingProcess, body: bytes, content_type: str, status: int
) -> None:
    response = post(server, content=body, headers={"content-type": content_type})
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_two_workers_on_this_machine_only(server: ServingProcess) -> None:
    assert len(server.workers()) == 2
    listening = {
        connection.laddr.ip
        for connection in psutil.Process(server.process.pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == server.port
    }
    assert listening == {"127.0.0.1"}


def test_a_taken_port_is_told_in_one_sentence(server: ServingProcess, folder: Path) -> None:
    command = [*BENTOML, "serve", "service:svc"]
    with ServingProcess(command, folder, folder / "taken", port=server.port) as other:
        assert other.wait() == 1
        errors = other.errors.read_text()
    assert f"Error: port {server.port} cannot be listened on" in errors
    assert "Traceback" not in errors


def test_predict_from_the_command_line(server: ServingProcess) -> None:
    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*MLOPS, "predict", *arguments],
            capture_output=True,
            text=True,
            timeout=LONG_S,
            check=False,
        )

    assert ask("hello", "--url", server.url).stdout == "first hello\n"
    assert '"model_type": "custom"' in ask("hello", "--url", server.url, "--json").stdout
    nobody = ask("hello", "--url", f"http://127.0.0.1:{free_port()}")
    assert nobody.returncode == 1
    assert "no service answers" in nobody.stderr
    assert "Traceback" not in nobody.stderr


def test_logs(server: ServingProcess, folder: Path) -> None:
    get(server, "/some%0Apath%1b[31m")
    shown = bentoml_command(folder, "logs", "my_service:latest")
    assert shown.returncode == 0, shown.stderr
    assert "model loaded" in shown.stdout
    assert 'path="/some\\npath\\u001b[31m"' in shown.stdout
    assert all("INFO [my_service]" in line for line in shown.stdout.splitlines())
    assert len(bentoml_command(folder, "logs", "my_service", "-n", "1").stdout.splitlines()) == 1
    for name in ("other_service", "../../etc/passwd"):
        missing = bentoml_command(folder, "logs", name)
        assert missing.returncode == 1
        assert missing.stderr.startswith("Error: ")
        assert "Traceback" not in missing.stderr


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_when_asked_and_leaves_nothing(folder: Path, ending: int) -> None:
    command = [*BENTOML, "serve", "service:svc", "--workers", "2"]
    with ServingProcess(command, folder, folder / f"home{ending}") as server:
        server.wait_until_ready()
        assert server.stop(ending) == 0, server.told()
        assert server.left_over() == []


@pytest.mark.parametrize(
    ("loading", "words"),
    [
        ("fails", "not for this model: package it again"),
        ("dies", "3 workers in a row ended before they were ready, and the last one ended with"),
    ],
)
def test_a_model_that_cannot_be_loaded_ends_the_server(
    folder: Path, loading: str, words: str
) -> None:
    command = [*BENTOML, "serve", "service:svc", "--workers", "2"]
    with ServingProcess(command, folder, folder / loading, LOADING=loading) as server:
        assert server.wait() == 1
        errors = server.errors.read_text()
        assert errors.count("Error:") == 1
        assert server.told().count(words) == 1
        assert words in errors
        assert "Traceback" not in errors
        logged = (folder / loading / "mlops" / "logs" / "my_service.log").read_text()
        assert logged.count(words) == 1
        assert server.left_over() == []


def test_a_mistake_in_the_service_is_told_before_anything_starts(folder: Path) -> None:
    (folder / "missing.py").write_text(SERVICE.replace('"model"', '"./nowhere"'))
    with ServingProcess([*BENTOML, "serve", "missing:svc"], folder, folder / "none") as server:
        assert server.wait() == 1
        assert server.errors.read_text().startswith("Error: './nowhere' does not exist")


def test_a_plain_bentoml_service(folder: Path) -> None:
    command = [*BENTOML, "serve", "plain:Plain", "--workers", "2"]
    with ServingProcess(command, folder, folder / "plain_home") as server:
        server.wait_until_ready()
        answer = httpx.post(f"{server.url}/shout", json={"text": "a"}, trust_env=False)
        assert answer.text == "A"
        assert len(server.workers()) == 2
        assert server.stop() == 0


def test_serve_a_model_folder(tmp_path: Path) -> None:
    from tiny_models import write_language_model

    model = write_language_model(tmp_path / "Tiny Model")
    with ServingProcess(
        [*MLOPS, "serve", str(model), "--reload"],
        tmp_path,
        tmp_path / "home",
        MLOPS_PROJECT_NAME="demo",
    ) as server:
        server.wait_until_ready()
        answer = post(server, json={"text": "a", "max_tokens": 3}).json()
        assert (
            answer.items()
            >= {
                "mlx_optimized": True,
                "model_type": "mlx",
                "service_name": "tiny-model",
                "project_name": "demo",
            }.items()
        )
        (model / "training.log").write_text("…")
        (model / "config.json").touch()
        server.wait_until_told("Tiny Model/config.json has changed: starting the workers again.")
        assert server.stop() == 0  # also while the workers start again
        assert server.left_over() == []
