"""What becomes of `mlops deploy` when its Ray cluster is killed, or changed from elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import psutil
import pytest
from serving_process import MLOPS, ServingProcess

from ray_cluster import LONG_S, environment, wait_until
from ray_services import build_waiting

pytestmark = pytest.mark.long
LOCAL = (*MLOPS, "deploy", "waiting:1.0.0", "--ray-address", "local", "--replicas", "1")


@pytest.fixture(scope="module")
def waiting_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray-attacks")
    home = folder / "bentoml"
    with environment(BENTOML_HOME=str(home)):
        for version in ("1.0.0", "2.0.0"):
            build_waiting(folder, version)
    return home


def _address(local: ServingProcess) -> str:
    return local.told().partition("cluster      ")[2].split()[0]


def test_a_cluster_killed_in_the_middle_is_one_sentence(waiting_home: Path, tmp_path: Path) -> None:
    with ServingProcess(LOCAL, tmp_path, waiting_home) as owner:
        wait_until(lambda: "Ctrl-C" in owner.told())
        command = (*MLOPS, "deploy", "waiting:1.0.0", "--ray-address", _address(owner))
        more = {"MLOPS_CPU_PER_WORKER": "500", "MLOPS_PROJECT_NAME": "more"}
        more["BENTOML_HOME"] = str(waiting_home)
        with ServingProcess(command, tmp_path, tmp_path / "other", owner.port, **more) as other:
            wait_until(lambda: "no node has room" in other.told())
            children = psutil.Process(owner.process.pid).children(recursive=True)
            before = len(other.told().splitlines())
            for child in (psutil.Process(owner.process.pid), *children):
                child.kill()
            assert other.wait() == 1
            said = other.told().splitlines()[before:]
            assert len(said) == 1 and "no Ray cluster answers at" in said[0], said


def test_two_cores_have_room_for_an_update(waiting_home: Path, tmp_path: Path) -> None:
    with ServingProcess(LOCAL, tmp_path, waiting_home) as command:
        wait_until(lambda: "Ctrl-C" in command.told())

        def mlops(*arguments: str) -> str:
            return subprocess.run(
                [*MLOPS, *arguments, "--ray-address", _address(command)],
                env={**os.environ, "BENTOML_HOME": str(waiting_home)},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                timeout=LONG_S,
            ).stdout

        update = ("deploy", "waiting:2.0.0", "--port", str(command.port), "--replicas", "1")
        updated = json.loads(mlops(*update, "--json"))
        assert (updated["bento_tag"], updated["num_replicas"]) == ("waiting:2.0.0", 1)
        (row,) = json.loads(mlops("status", "--json"))
        assert (row["bento_tag"], row["status"]) == ("waiting:2.0.0", "RUNNING")
        assert len(mlops("status").splitlines()) == 2, "a line for each application, in a pipe"
        gone = json.loads(mlops("undeploy", row["application"], "--json"))
        assert gone == {"application": row["application"], "status": "gone"}


def test_what_was_undeployed_elsewhere_ends_quietly(waiting_home: Path, tmp_path: Path) -> None:
    with ServingProcess(LOCAL, tmp_path, waiting_home) as command:
        wait_until(lambda: "Ctrl-C" in command.told())
        subprocess.run(
            [*MLOPS, "undeploy", "tests-waiting", "--ray-address", _address(command)],
            env={**os.environ, "BENTOML_HOME": str(waiting_home)},
            check=True,
            timeout=LONG_S,
        )
        assert command.stop() == 0, command.told()
    assert "Traceback" not in command.told()
