"""Folders that cannot be written and users without a home: served without, or a clear sentence."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from serving_process import BENTOML, LONG_S, ServingProcess

import tiny_models
from gated_service import GATE_VARIABLE, write_gated_service
from mlops.errors import MLOpsError
from mlops.serving.bentoml import logs
from mlops.serving.bentoml.served_model import make_served_model

NOBODY = 54321
"""A user id without an entry."""

FAILS_IN_A_WORKER = """
import os, signal, sys
if "--worker-id" in sys.argv:
    if os.environ["FAULT"] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise PermissionError("no place to write to")
"""

COMMANDS = """
import sys
from mlops.cli import main

for line in sys.argv[1:]:
    sys.argv[1:] = line.split()
    print("---", line, flush=True)
    try:
        main()
    except SystemExit as exc:
        print("status", exc.code, flush=True)
"""


def test_a_service_runs_without_its_log(tmp_path: Path) -> None:
    gate = write_gated_service(tmp_path)
    gate.touch()
    home = tmp_path / "home"
    home.mkdir()
    (home / "mlops").write_text("a file where the folder of the logs would be")
    command = [*BENTOML, "serve", "service:svc", "--workers", "2"]
    with ServingProcess(command, tmp_path, home, **{GATE_VARIABLE: str(gate)}) as server:
        server.wait_until_ready()
        answer = httpx.post(f"{server.url}/predict", json={"text": "Hi"}, trust_env=False)
        assert answer.status_code == 200
        assert server.stop() == 0
        assert server.told().count("nothing is kept for `bentoml logs`") == 1
        assert "Traceback" not in server.told()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raises", "and the last one ended with status 1: what it printed says why"),
        pytest.param(
            "killed",
            "the last one killed by SIGKILL, most likely for want of memory",
            marks=pytest.mark.long,
        ),
    ],
)
def test_workers_that_cannot_start_end_the_command(tmp_path: Path, fault: str, reason: str) -> None:
    write_gated_service(tmp_path)
    service = tmp_path / "service.py"
    service.write_text(FAILS_IN_A_WORKER + service.read_text())
    command = [*BENTOML, "serve", "service:svc"]
    with ServingProcess(command, tmp_path, tmp_path / "home", FAULT=fault) as server:
        assert server.wait() == 1
        errors = server.errors.read_text().splitlines()[-1]
        assert errors.startswith("Error: 3 workers in a row ended before they were ready")
        assert reason in errors
        assert server.left_over() == []


def test_a_log_that_can_no_longer_be_written_is_told_once(
    bentoml_home: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import bentoml

    @bentoml.service
    class Tiny: ...

    ours = logging.getLogger("mlops.test")
    with logs.of_command(Tiny), pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "_LOOK_S", 0)
        ours.warning("first")
        folder = bentoml_home / "mlops" / "logs"
        shutil.rmtree(folder)
        folder.write_text("a file in its place")
        for _ in range(3):
            ours.warning("later")
    assert caplog.messages.count("later") == 3
    said = capfd.readouterr().err
    assert said.count("lacks lines until it can be written") == 1
    assert "Traceback" not in said


@pytest.mark.parametrize("path", ["~nobody-of-that-name/model", "~nobody-of-that-name"])
def test_the_home_of_an_unknown_user_is_a_path_that_does_not_exist(path: str) -> None:
    from mlops.checkpoints import recognise

    for find in (recognise, make_served_model):
        with pytest.raises(MLOpsError, match="does not exist"):
            find(path)


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0 or not shutil.which("setpriv"),
    reason="only root can become another user, with setpriv",
)
@pytest.mark.parametrize("home", [None, "/nonexistent"])
def test_commands_of_a_user_without_a_home_end_in_a_sentence(
    tmp_path: Path, home: str | None
) -> None:
    tiny_models.write_language_model(tmp_path / "model")
    who = ["--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"]
    # It may look into all folders, such as that of this Python, and write to none.
    may_read = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    lines = ["doctor", "models list", "package model --name small", "serve model", "serve small:1"]
    done = subprocess.run(
        ["setpriv", *who, *may_read, sys.executable, "-c", COMMANDS, *lines],
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"],
            "BENTOML_DO_NOT_TRACK": "True",
            **({} if home is None else {"HOME": home}),
        },
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )
    told = done.stdout + done.stderr
    assert "Traceback" not in told
    assert told.count("status 1") == len(lines), told
    assert told.count("the model store cannot be opened") == len(lines) - 1
    assert not (tmp_path / "~").exists()
