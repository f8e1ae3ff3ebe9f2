"""The command line as a user has it: package, serve, predict and chat with a real service."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_process import LONG_S, MLOPS, ServingProcess

from live_server import LiveServer
from mlops.serving.http import RunnerHost
from mlops.serving.runner.base import TextChunk
from tiny_models import write_language_model, write_lora_adapter

KEY = "a-key-of-the-first-team"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command-line")
    base = write_language_model(folder / "base")
    for seed, name in enumerate(("formal", "brief", "third"), 1):
        write_lora_adapter(folder / name, base, seed=seed)
    (folder / "keys").write_text(f"{KEY}\n")
    (folder / "mlops.yaml").write_text("max_batch_size: 16\nhttp: {max_prompt_tokens: 100}\n")
    return folder


def mlops(folder: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MLOPS, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "BENTOML_HOME": str(folder / "home"), "MLOPS_API_KEY": KEY},
        **options,
    )


@pytest.fixture(scope="module")
def bento(folder: Path) -> str:
    """Base and two adapters, packaged from the command line."""
    done = mlops(
        folder,
        *("package", "base", "--name", "helpdesk", "--version", "1.0.0", "--json"),
        *("--adapter", "formal=formal", "--adapter", "brief=brief"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert sorted(result["adapter_tags"]) == ["brief", "formal"]
    return str(result["bento_tag"])


@pytest.fixture(scope="module")
def service(folder: Path, bento: str) -> Iterator[str]:
    """The Bento, served by its name with more than it has of its own; gives its URL."""
    command = (
        *(*MLOPS, "serve", bento.partition(":")[0], "--adapter", "third=third"),
        *("--config", "mlops.yaml", "--api-key-file", "keys", "--max-batch-size", "2"),
    )
    with ServingProcess(command, folder, folder / "home") as serving:
        serving.wait_until_ready()
        yield serving.url


def test_a_bento_is_served_with_what_the_command_line_adds(service: str) -> None:
    with httpx.Client(base_url=service, trust_env=False) as client:
        assert client.get("/v1/models").status_code == 401
        client.headers["Authorization"] = f"Bearer {KEY}"
        cards = client.get("/v1/models").json()["data"]
        assert {card["id"] for card in cards if card["parent"]} == {"formal", "brief", "third"}
        answer = client.post("/predict", json={"text": "a", "adapter": "third", "max_tokens": 2})
        assert answer.json()["adapter"] == "third"
        assert client.get("/metrics").json()["engine"]["max_rows"] == 2  # the option, not the file
        too_long = client.post("/predict", json={"text": "a" * 101})
        assert "this service takes 100 at most" in too_long.json()["error"]["message"]


def test_predict_reads_standard_input_and_streams(folder: Path, service: str) -> None:
    asked = ("predict", "-", "--url", service, "--max-tokens", "8", "--adapter", "formal")
    whole = mlops(folder, *asked, "--json", input="What is a list?\n")
    assert (whole.returncode, whole.stderr) == (0, "")
    prediction = json.loads(whole.stdout)["prediction"]
    for way in ("--stream", "--no-stream"):
        done = mlops(folder, *asked, way, input="What is a list?\n")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{prediction}\n", "")
    refused = mlops(folder, *asked, "--stream", "--adapter", "nobody", input="a")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "there is no adapter 'nobody'" in refused.stderr


def test_chat_from_a_pipe(folder: Path, service: str) -> None:
    lines = "What is a list?\n\n/adapter third\n/adapter\n/help\nAnd a dict?\n/exit\nnever\n"
    asked = ("chat", "--url", service, "--max-tokens", "4", "--temperature", "0")
    done = mlops(folder, *asked, input=lines)
    assert done.returncode == 0, done.stderr
    assert "brief, formal, third, base" in done.stderr
    assert "/reset" in done.stderr  # of /help, which is no answer

    begun = mlops(folder, *asked, input="What is a list?\n")
    assert done.stdout.startswith(begun.stdout)
    assert len(done.stdout) > len(begun.stdout)
    for wrong, said in (("/adapter nobody", "it has brief, formal"), ("/x", "no command /x")):
        ended = mlops(folder, "chat", "--url", service, input=f"{wrong}\nnever\n")
        assert (ended.returncode, ended.stdout) == (1, "")
        assert said in ended.stderr


TAKE_TERMINAL = (
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGINT, signal.SIG_DFL); "  # whoever runs the tests may ignore it
    "os.execv(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """`mlops` at a terminal of its own; leaving the context ends it."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._keyboard, screen = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, *MLOPS, *arguments],
            stdin=screen,
            stdout=screen,
            stderr=screen,
            cwd=folder,
            env={**os.environ, "TERM": "dumb", "COLUMNS": "80", "MLOPS_API_KEY": KEY},
            start_new_session=True,
        )
        os.close(screen)
        self.shown = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(LONG_S)
        os.close(self._keyboard)

    def type(self, keys: str) -> None:
        self.shown = ""
        os.write(self._keyboard, keys.encode())

    def read_until(self, text: str) -> str:
        """What is shown since the last keys, up to `text`."""
        give_up = time.monotonic() + LONG_S
        while text not in self.shown:
            assert time.monotonic() < give_up, self.shown
            assert self._read(), self.shown
        return self.shown

    def insist(self, key: str, text: str) -> None:
        """Type a key, again and again, until `text` is shown: readline does not notice a signal
        that comes while it looks at a character."""
        give_up = time.monotonic() + LONG_S
        self.type(key)
        while text not in self.shown:
            assert time.monotonic() < give_up, self.shown
            if select.select([self._keyboard], [], [], 1.0)[0]:
                assert self._read(), self.shown
            else:
                os.write(self._keyboard, key.encode())

    def status(self) -> int:
        """The exit status of a program that ends by itself."""
        while self._read():
            pass
        return self.process.wait(LONG_S)

    def _read(self) -> bool:
        """Take what is shown next; False when the program has ended."""
        try:
            data = os.read(self._keyboard, 4096)
        except OSError:  # how Linux says it
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)


def test_chat_at_a_terminal(folder: Path, service: str) -> None:
    with Terminal(folder, "chat", "--url", service, "--max-tokens", "4") as terminal:
        assert "helpdesk" in terminal.read_until("> ")
        terminal.type("/adapter third\n")
        terminal.read_until("third> ")
        terminal.type("/adapter nobody\n")  # a mistake ends nothing
        assert "it has brief, formal, third, base" in terminal.read_until("third> ")
        terminal.type("What is a list?\n")
        assert "cut off" in terminal.read_until("third> ")
        terminal.type("half a line")
        terminal.read_until("half a line")
        terminal.insist("\x03", "Ctrl-D or /exit leaves")
        terminal.read_until("third> ")  # before it, the terminal still reads whole lines
        terminal.type("\x04")
        assert terminal.status() == 0
        assert "Traceback" not in terminal.shown


class EndlessAnswer:
    def __init__(self) -> None:
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    async def begun(self) -> None:
        pass

    async def chunks(self) -> AsyncIterator[TextChunk]:
        for number in itertools.count():
            if self.is_cancelled:
                return
            yield TextChunk(0, f" {number}", (number,))
            await asyncio.sleep(0.01)

    async def prediction(self) -> dict[str, Any]:
        raise AssertionError("it never ends")


class EndlessRunner:
    can_generate = True
    is_loaded = True

    def load_model(self) -> None:
        pass

    def unload_model(self) -> None:
        pass

    def generate(self, input_data: Any, *, deadline_s: float | None = None) -> EndlessAnswer:
        return EndlessAnswer()

    def token_bytes(self, token_ids: Any, adapter: Any = None) -> list[bytes]:
        return [b"" for _ in token_ids]

    def predict(self, input_data: Any) -> Any:
        raise AssertionError("it is only streamed")

    predict_batch = predict

    def statistics(self) -> dict[str, Any]:
        return {}

    def get_memory_usage(self) -> dict[str, Any]:
        return {"total_mb": 1.0}


@pytest.fixture(scope="module")
def endless() -> Iterator[str]:
    """A service whose answers go on until their client leaves."""
    with LiveServer(RunnerHost(EndlessRunner)) as server:  # type: ignore[arg-type]
        yield server.url


def test_ctrl_c_stops_an_answer_and_not_the_chat(folder: Path, endless: str) -> None:
    with Terminal(folder, "chat", "--url", endless) as terminal:
        terminal.read_until("> ")
        for _ in range(2):
            terminal.type("count\n")
            terminal.read_until(" 2 ")
            terminal.type("\x03")
            terminal.read_until("stopped")
            terminal.read_until("> ")
        terminal.type("/exit\n")
        assert terminal.status() == 0


def test_ctrl_c_ends_predict_with_130(folder: Path, endless: str) -> None:
    with Terminal(folder, "predict", "count", "--url", endless) as terminal:
        terminal.read_until(" 2 ")  # it streams, without being asked to
        terminal.type("\x03")
        assert terminal.status() == 130
        assert "Traceback" not in terminal.shown


def test_what_a_service_cannot_honour_is_refused_by_name(folder: Path) -> None:
    (folder / "plain.py").write_text(
        "import bentoml\n\n\n@bentoml.service\nclass Plain:\n    pass\n"
    )
    options = ("--adapter", "third=third", "--max-batch-size", "2")
    done = mlops(folder, "serve", "plain:Plain", *options, timeout=LONG_S)
    assert done.returncode == 1
    assert "--adapter, --max-batch-size cannot be honoured" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_warning_is_shown_once(folder: Path) -> None:
    noted = write_language_model(folder / "noted")
    config = json.loads((noted / "config.json").read_text())
    (noted / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "a.B"}}))
    done = mlops(folder, "package", "noted", "--no-bento")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("which is never run") == 1
    assert "which is never run" not in done.stderr
