"""The limit of open files: who would lower it, and what happens when there are no more."""

from __future__ import annotations

import ast
import contextlib
import json
import resource
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving_process import BENTOML, ServingProcess

import mlops
from mlops.hardware.open_files import open_file_limit_kept, raise_open_file_limit
from mlops.serving.bentoml.connections import HEAD_S
from tiny_models import write_language_model

LONG_S = 120.0

LOADS = """
import resource, sys

resource.setrlimit(resource.RLIMIT_NOFILE, (500, 3000))  # less than mlx-lm wants
from mlops.serving.runner import MLXModelRunner

runner = MLXModelRunner(sys.argv[1])
runner.load_model()
print(runner.predict({"text": "a", "max_tokens": 1})["finish_reason"])
runner.unload_model()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""

SERVES = """
import contextlib, logging, resource, socket, sys

import uvicorn

from mlops.serving.bentoml.connections import watched
from mlops.serving.http import RunnerHost, Served, ServiceInfo, create_app


class EchoRunner:
    is_loaded = True

    def load_model(self):
        pass

    def unload_model(self):
        pass

    def predict_batch(self, inputs):
        return [{"prediction": fields["text"]} for fields in inputs]

    def predict(self, fields):
        return {"prediction": fields["text"]}

    def get_memory_usage(self):
        return {}


logging.basicConfig(stream=sys.stderr)
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2)
host = RunnerHost(EchoRunner)
app = create_app(Served(host, ServiceInfo("tiny")))
listener = socket.create_server(("127.0.0.1", 0), backlog=4096)


@contextlib.asynccontextmanager
async def lifespan(_):
    async with watched(server, host):
        host.start()
        yield
        host.stop()


app.router.lifespan_context = lifespan
server = uvicorn.Server(uvicorn.Config(app, log_config=None, backlog=2048))
print(listener.getsockname()[1], flush=True)
server.run(sockets=[listener])
"""


def test_every_import_of_mlx_lm_keeps_the_limit() -> None:
    """All of them, wherever they are written: in a block that keeps it."""
    strays = []
    sources = Path(mlops.__file__).parent
    for path in sources.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        kept = {
            id(inside)
            for block in ast.walk(tree)
            if isinstance(block, ast.With)
            and any("open_file_limit_kept" in ast.unparse(one) for one in block.items)
            for inside in ast.walk(block)
        }
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
                names = [ast.unparse(argument).strip("'\"") for argument in node.args]
            if any(name.split(".")[0] == "mlx_lm" for name in names) and id(node) not in kept:
                strays.append(f"{path.relative_to(sources)}:{node.lineno}")
    assert strays == []


def test_a_model_loads_under_any_limit_and_leaves_it_alone(tmp_path: Path) -> None:
    model = write_language_model(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(model)],
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )
    assert done.stdout.split()[-3:] == ["length", "500", "3000"], done.stderr


def test_other_threads_may_change_the_limit_meanwhile() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = before
    assert soft > 64
    lower = soft - 1, hard
    try:
        with open_file_limit_kept():
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
            other = threading.Thread(
                target=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, lower)
            )
            other.start()
            other.join()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == lower
        raise_open_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(soft, hard, 10_240)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of a server that may open 256 files."""
    errors = tmp_path_factory.mktemp("server") / "errors"
    with errors.open("wb") as told:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVES, "256"], stdout=subprocess.PIPE, stderr=told, text=True
        )
    try:
        assert process.stdout is not None
        first_line = process.stdout.readline()
        assert first_line, errors.read_text()
        ask(int(first_line), "warm")
        yield int(first_line)
        assert process.poll() is None, errors.read_text()
    finally:
        process.kill()
        process.communicate()
    said = errors.read_text()
    assert 1 <= said.count("connections are too many") <= 3, said  # once a minute
    assert "Traceback" not in said


@contextlib.contextmanager
def silent_clients(port: int, number: int, says: bytes = b"") -> Iterator[list[socket.socket]]:
    """Connections that ask for nothing, or never finish asking."""
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(number):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), LONG_S))
            with contextlib.suppress(OSError):  # closed already, for want of room
                client.sendall(says)
            clients.append(client)
        yield clients


def ask(port: int, text: str) -> str:
    """Ask until there is an answer: a connection may be refused while room is being made."""
    give_up = time.monotonic() + LONG_S
    while True:
        try:
            url = f"http://127.0.0.1:{port}/predict"
            response = httpx.post(url, json={"text": text}, timeout=LONG_S, trust_env=False)
        except httpx.TransportError:
            assert time.monotonic() < give_up
            continue
        if response.status_code == 200:
            prediction: str = response.json()["prediction"]
            return prediction
        assert response.status_code == 503
        assert time.monotonic() < give_up


@pytest.mark.parametrize("says", [b"", b"GET /livez HTTP/1.1\r\nHost: "])
def test_idle_connections_give_way_to_requests(port: int, says: bytes) -> None:
    begun_s = time.monotonic()
    with silent_clients(port, 600, says):
        assert [ask(port, str(number)) for number in range(20)] == list(map(str, range(20)))
        # Else their time would have been over, and nothing shown.
        assert time.monotonic() - begun_s < HEAD_S


def test_where_all_connections_work_a_new_one_is_told_so(port: int) -> None:
    """Nobody who is being answered has to go for it; and there is room again when they have."""
    body = json.dumps({"text": "a"}).encode()
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    begun = head + b"Content-Length: %d\r\n\r\n" % len(body)
    with silent_clients(port, 230, begun) as clients:
        # They are taken in their order: when the last is answered, the others are.
        assert clients[-1].recv(65536).startswith(b"HTTP/1.1 503 ")
        refused = {client for client in clients[:-1] if is_readable(client)} | {clients[-1]}
        assert len(refused) < len(clients) / 2
        for client in set(clients) - refused:
            client.sendall(body)
            assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert ask(port, "again") == "again"


def is_readable(client: socket.socket) -> bool:
    poll = select.poll()
    poll.register(client, select.POLLIN)
    return bool(poll.poll(0))


@pytest.mark.long
def test_thousands_of_idle_connections_on_a_real_server(tmp_path: Path) -> None:
    """mlx-lm's limit is 2048: before it was kept away, these made the service deaf for 32 s."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 8192:
        pytest.skip(f"this system allows {hard} open files, and the test needs 8192")
    raise_open_file_limit()
    model = write_language_model(tmp_path / "model")
    (tmp_path / "service.py").write_text(
        "from mlops.serving.bentoml.service import create_bentoml_service\n"
        f"svc = create_bentoml_service({str(model)!r}, 'tiny')\n"
    )
    command = [*BENTOML, "serve", "service:svc"]
    with ServingProcess(command, tmp_path, tmp_path / "home") as server:
        server.wait_until_ready()
        begun_s = time.monotonic()
        with silent_clients(server.port, 3000):
            fields = {"text": "a", "max_tokens": 1}
            for _ in range(20):
                response = httpx.post(
                    f"{server.url}/predict", json=fields, timeout=LONG_S, trust_env=False
                )
                assert response.status_code == 200
            assert time.monotonic() - begun_s < HEAD_S
        (worker,) = server.workers()
        assert worker.is_running()
