"""`bentoml serve --reload` in a folder where others write all the time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_process import BENTOML, LONG_S, ServingProcess

SERVICE = """
from pathlib import Path

from prometheus_client import Counter

from mlops.errors import ServiceError
from mlops.serving.bentoml.service import create_bentoml_service

PREDICTIONS = Counter("echo_predictions", "Made when the module is imported, in each new worker.")


class EchoRunner:
    def __init__(self, model_path):
        self.model_path = Path(model_path)
        self.is_loaded = False

    def load_model(self):
        self.weights = (self.model_path / "weights.npz").read_text()
        if self.weights == "torn":
            raise ServiceError("the weights are torn")
        Path("loaded.txt").write_text(self.weights)  # what a worker writes is no change
        self.is_loaded = True

    def predict(self, input_data):
        return {"prediction": f"first {self.weights}"}

    def predict_batch(self, inputs):
        return [self.predict(fields) for fields in inputs]

    def get_memory_usage(self):
        return {"total_mb": 1.0}

    def unload_model(self):
        self.is_loaded = False


svc = create_bentoml_service("model", "echo", model_type="custom", runner_class=EchoRunner)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "service.py").write_text(SERVICE)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.npz").write_text("one")
    return tmp_path


@pytest.fixture
def others(folder: Path) -> Iterator[None]:
    """A log, a database and a log of training that grow; the store lies in the folder too."""
    is_over = threading.Event()

    def write() -> None:
        while not is_over.wait(0.05):
            for name in ("app.log", "mlflow.db", "notes.txt", "model/training.log"):
                with (folder / name).open("a") as file:
                    file.write("line\n")

    writer = threading.Thread(target=write)
    writer.start()
    yield
    is_over.set()
    writer.join()


@pytest.mark.usefixtures("others")
def test_only_what_the_service_consists_of_starts_it_again(folder: Path) -> None:
    command = [*BENTOML, "serve", "service:svc", "--reload"]
    with ServingProcess(command, folder, folder / "home") as server:
        server.wait_until_ready()
        assert answer(server) == "first one"
        workers = server.workers()

        # A service that cannot be imported: the one before answers.
        edited = "import extra\n" + SERVICE.replace("first", "{extra.WORD}")
        (folder / "extra.py").write_text("WORD = 'second'\n)\n")
        (folder / "service.py").write_text(edited)
        server.wait_until_told("extra.py, line 2: SyntaxError: unmatched ')'")
        assert answer(server) == "first one"
        assert server.workers() == workers

        (folder / "extra.py").write_text("WORD = 'second'\n")
        until(lambda: answer(server) == "second one", server)

        # A model that cannot be loaded: the server waits for another.
        (folder / "model" / "weights.npz").write_text("torn")
        until(lambda: health(server).get("error") is not None, server)
        assert health(server)["error"]["message"].startswith("the weights are torn")
        (folder / "model" / "weights.npz").write_text("two")
        until(lambda: answer(server) == "second two", server)

        assert restarts(server) == [
            "extra.py has changed: starting the workers again.",
            "model/weights.npz has changed: starting the workers again.",
            "model/weights.npz has changed: starting the workers again.",
        ]
        assert server.stop() == 0
        assert not server.left_over()


def answer(server: ServingProcess) -> Any:
    """What it predicts; None while it starts."""
    try:
        response = httpx.post(
            f"{server.url}/predict", json={"input": 1}, timeout=LONG_S, trust_env=False
        )
    except httpx.TransportError:
        return None
    return response.json().get("prediction")


def health(server: ServingProcess) -> Any:
    try:
        return httpx.get(f"{server.url}/health", timeout=LONG_S, trust_env=False).json()
    except httpx.TransportError:
        return {}


def restarts(server: ServingProcess) -> list[str]:
    return [line for line in server.told().splitlines() if "starting the workers again" in line]


def until(condition: Callable[[], bool], server: ServingProcess) -> None:
    give_up = time.monotonic() + LONG_S
    while not condition():
        assert server.process.poll() is None, server.told()
        assert time.monotonic() < give_up, server.told()
        time.sleep(0.05)
