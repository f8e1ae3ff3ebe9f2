"""Servers of the benchmarks: processes on free ports, ready when entered, ended when left.

`mlops_server` is `bentoml serve` with a service of ours. `mlx_lm_server` is the peer, with its own
defaults of 32 rows in decoding and 8 in prefill; by `mlops run --` it computes with the same BLAS
as ours, and without it as its wheel was installed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

REPOSITORY = Path(__file__).parents[1]
READY_S = 180.0
END_S = 30.0
MAX_ROWS = 32


@contextlib.contextmanager
def mlops_server(
    folder: Path,
    model: Path | str,
    *,
    adapters: Mapping[str, Path] | None = None,
    **config: Any,
) -> Iterator[int]:
    """Serve `model` with `bentoml serve`; gives its port.

    Args:
        folder: an empty folder for the service's module and BentoML's files; made if need be.
        config: of `BentoMLConfig`.
    """
    arguments = {
        "adapters": {name: str(path) for name, path in (adapters or {}).items()},
        "config": config,
    }
    source = (
        "from mlops.serving.bentoml.service import create_bentoml_service\n"
        f"svc = create_bentoml_service({str(model)!r}, 'bench', **{arguments!r})\n"
    )
    with bentoml_server(folder, source) as port:
        yield port


@contextlib.contextmanager
def bentoml_server(folder: Path, source: str) -> Iterator[int]:
    """Serve the one service that this module's source makes, with `bentoml serve`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "service.py").write_text(source)
    command = [sys.executable, "-m", "bentoml", "serve", "."]
    environment = {
        "BENTOML_HOME": str(folder / "home"),
        "BENTOML_DO_NOT_TRACK": "True",
        "PYTHONPATH": str(REPOSITORY),
    }
    with running(command, folder, "/readyz", environment) as port:
        yield port


@contextlib.contextmanager
def peer_server(folder: Path, module: str, *options: str) -> Iterator[int]:
    """Run a module of the benchmarks that is a server."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", module, *options]
    with running(command, folder, "/readyz", {"PYTHONPATH": str(REPOSITORY)}) as port:
        yield port


@contextlib.contextmanager
def mlx_lm_server(folder: Path, model: Path, *, as_installed: bool = False) -> Iterator[int]:
    """Serve `model` with `mlx_lm.server`; gives its port."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [] if as_installed else ["mlops", "run", "--"]
    command += [sys.executable, "-m", "mlx_lm", "server", "--model", str(model)]
    command += ["--decode-concurrency", str(MAX_ROWS), "--log-level", "WARNING"]
    with running(command, folder, "/health", {"HF_HUB_OFFLINE": "1"}) as port:
        yield port


@contextlib.contextmanager
def running(
    command: Sequence[str], folder: Path, ready_path: str, environment: Mapping[str, str]
) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    log = folder / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=folder,
            env={**os.environ, **environment},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        _await_ready(server, f"http://127.0.0.1:{port}{ready_path}")
        yield port
    except BaseException:
        print(_end_of(log), file=sys.stderr)
        raise
    finally:
        server.terminate()
        try:
            server.wait(END_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):  # LitServe's workers outlive it
                os.killpg(server.pid, signal.SIGKILL)
            server.wait(END_S)


def _await_ready(server: subprocess.Popen[bytes], url: str) -> None:
    deadline_s = time.monotonic() + READY_S
    while not _is_ready(url):
        if time.monotonic() > deadline_s or server.poll() is not None:
            raise SystemExit(f"{url} did not come up")
        time.sleep(0.1)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])
