"""Running the blocks of one document in a folder of its own, as a reader would."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from documents import NEEDS, REPOSITORY, Block

GUIDE_PORT = "3000"
READY_TIMEOUT_S = 120
READY_ANSWERS = 10
"""So many in a row, of new connections, until all of a server's workers are taken to be ready."""
STOP_TIMEOUT_S = 60
_WORKER = Path(__file__).with_name("python_worker.py")


class BlockError(AssertionError):
    """A block did not do what the document says."""


class DocumentSession:
    """Runs blocks in order.

    Args:
        folder: the working folder, with the models that the documents speak of.
        home: where the store, the logs and the cache are; outside of `folder`, because
            `bentoml serve --reload` watches that.
    """

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder = folder
        self.home = home
        self.port = _free_port()
        self.last_line = 0
        self._output: str | None = None
        self._worker: subprocess.Popen[str] | None = None
        self._answers: Any = None
        self._server: subprocess.Popen[bytes] | None = None
        self._num_servers = 0
        self._environment = self._make_environment()

    def run(self, block: Block) -> str | None:
        """Do what the block asks for; returns why it was skipped, if it was.

        Raises:
            BlockError: it failed, or did not answer what the document says.
        """
        self.last_line = block.line
        content = re.sub(rf"\b{GUIDE_PORT}\b", str(self.port), block.content)
        if block.needs is not None and not _has(block.needs):
            self._output = None
            self._check(block, content)
            return NEEDS[block.needs]
        if "file" in block.attributes:
            self._write(block, content)
        elif block.language == "python":
            self._output = self._run_python(block, content)
        elif "background" in block.attributes:
            self._serve(block, content)
        elif block.language == "bash":
            self._wait_until_ready()
            self._output = self._run_bash(content)
        elif self._output is None:
            return "the block before was not run"
        elif "response" in block.attributes:
            check_fields(json.loads(content), last_json(self._output))
        else:
            check_output(content, self._output)
        return None

    def close(self) -> None:
        """Stop what was started."""
        self._stop_server()
        worker, self._worker = self._worker, None
        if worker is None:
            return
        assert worker.stdin is not None
        worker.stdin.close()
        self._answers.close()
        try:
            status = worker.wait(STOP_TIMEOUT_S)
        finally:
            _end_group(worker)
        if status != 0:
            log = self._log("python.log")
            raise BlockError(f"the document's Python ended with status {status}\n{log}")

    def _make_environment(self) -> dict[str, str]:
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MLOPS_", "MLFLOW_", "BENTOML_", "PYTEST_", "COV_"))
        }
        scripts = Path(sys.executable).parent
        ray_port = _free_port()
        return environment | {
            "PATH": f"{scripts}{os.pathsep}{environment.get('PATH', os.defpath)}",
            "BENTOML_HOME": str(self.home / "bentoml"),
            "BENTOML_DO_NOT_TRACK": "True",
            "BENTOML_PORT": str(self.port),
            "HF_HUB_OFFLINE": "1",
            # A cluster that the document starts, and no other one of this machine.
            "RAY_GCS_SERVER_PORT": str(ray_port),
            "RAY_ADDRESS": f"127.0.0.1:{ray_port}",
            "COLUMNS": "160",
            "NO_COLOR": "1",
            "TERM": "dumb",
        }

    def _write(self, block: Block, content: str) -> None:
        if block.language == "python":
            compile(content, block.name, "exec")
        path = self.folder / block.attributes["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        # The next server may start within the second in which a file of the same size was compiled.
        shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)

    def _run_python(self, block: Block, content: str) -> str:
        if self._worker is None:
            self._start_worker()
        assert self._worker is not None
        assert self._worker.stdin is not None
        self._wait_until_ready()
        command = {"path": str(block.document), "line": block.line, "code": content}
        self._worker.stdin.write(json.dumps(command) + "\n")
        self._worker.stdin.flush()
        line = self._answers.readline()
        if not line:
            raise BlockError(f"Python ended in this block\n{self._log('python.log')}")
        answer = json.loads(line)
        if answer["error"]:
            printed = answer["output"]
            raise BlockError(f"{answer['error']}\nprinted:\n{printed}\n{self._log('python.log')}")
        return str(answer["output"])

    def _start_worker(self) -> None:
        reader, writer = os.pipe()
        with (self.home / "python.log").open("wb") as log:
            self._worker = subprocess.Popen(
                [sys.executable, str(_WORKER), str(writer)],
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[writer],
                text=True,
                start_new_session=True,
            )
        os.close(writer)
        self._answers = os.fdopen(reader)

    def _run_bash(self, content: str) -> str:
        process = subprocess.Popen(
            ["bash", "-c", f"set -euo pipefail\n{content}"],
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, errors = process.communicate()
        finally:
            _end_group(process)
        if process.returncode != 0:
            raise BlockError(
                f"exit status {process.returncode}\n{output}\n{errors}\n{self._server_log()}"
            )
        return output

    def _serve(self, block: Block, content: str) -> None:
        self._stop_server()
        self._num_servers += 1
        with (self.home / f"server-{self._num_servers}.log").open("wb") as log:
            self._server = subprocess.Popen(
                ["bash", "-c", f"set -euo pipefail\n{content}"],
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait_until_ready(READY_ANSWERS)

    def _wait_until_ready(self, num_answers: int = 1) -> None:
        server = self._server
        if server is None:
            return
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not all(_answers(self.port) for _ in range(num_answers)):
            if server.poll() is not None:
                raise BlockError(f"the server ended\n{self._server_log()}")
            if time.monotonic() > deadline:
                raise BlockError(
                    f"the server was not ready within {READY_TIMEOUT_S} s\n{self._server_log()}"
                )
            time.sleep(0.1)

    def _stop_server(self) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            _command_of(server).terminate()
        try:
            server.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired as exc:
            raise BlockError(
                f"the server did not stop within {STOP_TIMEOUT_S} s\n{self._server_log()}"
            ) from exc
        finally:
            _end_group(server)

    def _check(self, block: Block, content: str) -> None:
        """What can be said of a block without running it."""
        if block.language == "python":
            compile(content, block.name, "exec")
            return
        checked = subprocess.run(
            ["bash", "-n", "-c", content], check=False, capture_output=True, text=True
        )
        if checked.returncode != 0:
            raise BlockError(checked.stderr)
        for line in content.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["make"]:
                self._must_succeed(["make", "--dry-run", *words[1:]], REPOSITORY)
            elif words[:1] in (["bentoml"], ["mlops"]):
                self._must_succeed([*words[:2], "--help"], self.folder)

    def _must_succeed(self, command: list[str], folder: Path) -> None:
        done = subprocess.run(
            command, cwd=folder, env=self._environment, check=False, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise BlockError(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")

    def _server_log(self) -> str:
        return self._log(f"server-{self._num_servers}.log") if self._num_servers else ""

    def _log(self, name: str) -> str:
        path = self.home / name
        if not path.exists():
            return ""
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([f"--- the end of {name}", *lines[-60:]])


def check_fields(expected: Any, found: Any, where: str = "the answer") -> None:
    """Every field that is expected must be there, with a value of the same JSON type."""
    if _json_type(expected) != _json_type(found):
        raise BlockError(f"{where} is {found!r}, not like {expected!r}")
    if isinstance(expected, dict):
        for name, value in expected.items():
            if name not in found:
                raise BlockError(f"{where} has no {name!r}: {found!r}")
            check_fields(value, found[name], f"{where}.{name}")
    elif isinstance(expected, list):
        if expected and not found:
            raise BlockError(f"{where} is empty")
        for number, (one, other) in enumerate(zip(expected, found, strict=False)):
            check_fields(one, other, f"{where}[{number}]")


def last_json(output: str) -> Any:
    """The last JSON object in what a command printed."""
    decoder = json.JSONDecoder()
    at, last = 0, None
    while (start := output.find("{", at)) >= 0:
        try:
            last, at = decoder.raw_decode(output, start)
        except ValueError:
            at = start + 1
    if last is None:
        raise BlockError(f"no JSON object was printed, but:\n{output}")
    return last


def check_output(expected: str, found: str) -> None:
    """The output must be as written, but for what `…` stands for."""
    lines = []
    for line in expected.strip("\n").splitlines():
        if line.strip() == "…":
            lines.append(r"(?:.*\n)*?")
        else:
            lines.append(".*?".join(map(re.escape, line.rstrip().split("…"))) + r"[ ]*\n")
    if not re.fullmatch("".join(lines), found.strip("\n") + "\n"):
        raise BlockError(f"printed:\n{found}\ninstead of:\n{expected}")


def _json_type(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return type(value).__name__
    return "number" if isinstance(value, int | float) else type(value).__name__


def _has(need: str) -> bool:
    return need == "lsof" and shutil.which("lsof") is not None


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _command_of(shell: subprocess.Popen[Any]) -> psutil.Process:
    """The command that a shell runs; a newer bash has become it."""
    process = psutil.Process(shell.pid)
    commands = process.children() if process.name() == "bash" else []
    return commands[-1] if commands else process


def _end_group(leader: subprocess.Popen[Any]) -> None:
    """End what a process of ours left behind in the process group that it began."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader.pid, signal.SIGKILL)
    leader.wait()
