"""`mlops deploy` and its sisters as a user types them."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import yaml
from serving_process import MLOPS, ServingProcess, free_port

from mlops.errors import DeploymentError
from mlops.serving.ray import deploy, scale
from ray_cluster import LONG_S, RayCluster, answers, applications, post, processes, wait_until


def mlops(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MLOPS, *arguments],
        env={**os.environ, "BENTOML_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )


def test_a_cluster_of_its_own_ends_when_its_requests_have(home: Path, tmp_path: Path) -> None:
    command = (*MLOPS, "deploy", "waiting:1.0.0", "--ray-address", "local", "--replicas", "1")
    with ServingProcess(command, tmp_path, home, MLOPS_RAY__ROUTE_PREFIX="/") as server:
        server.wait_until_ready()
        wait_until(lambda: "Ctrl-C" in server.told())
        assert f"answers at {server.url}" in server.told()
        assert "dashboard    http://" in server.told()

        # Nothing listens outside of this machine, but what Ray gives no choice in.
        (replica,) = processes("ray::ServeReplica", of=server.process.pid)
        command_process = psutil.Process(server.process.pid)
        outside = [
            process.pid
            for process in (command_process, *command_process.children(recursive=True))
            for one in process.net_connections("inet")
            if one.status == psutil.CONN_LISTEN and "127.0.0.1" not in one.laddr.ip
        ]
        assert outside == [replica.pid]  # its gRPC port, which asks for the token
        address = re.findall(r"cluster +(\S+)", server.told())[0]
        told = mlops("status", "--ray-address", address, home=home)
        assert "tests-waiting" in told.stdout, told.stderr
        refused = mlops("status", "--ray-address", address, home=home, RAY_AUTH_TOKEN="another")
        assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
        assert "wants another token" in refused.stderr

        assert replica.nice() == psutil.Process().nice()

        # SIGTERM under load: what runs is answered, and then everything is gone.
        statuses = Counter[int]()

        def ask() -> None:
            statuses[post(f"{server.url}/predict", {"input": 2}).status_code] += 1

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)  # until all of them are being answered
        server.seen.update(psutil.Process(server.process.pid).children(recursive=True))
        assert server.stop() == 0, server.told()
        for thread in threads:
            thread.join()
        assert statuses == {200: 4}
        wait_until(lambda: not server.left_over())
    assert "Traceback" not in server.told()


def test_a_cluster_that_is_not_there(home: Path, tmp_path: Path) -> None:
    port = free_port()
    for arguments in (("status",), ("deploy", "tiny:1.0.0"), ("scale", "x", "2")):
        done = mlops(*arguments, "--ray-address", f"127.0.0.1:{port}", home=home)
        assert done.returncode == 1
        assert f"no Ray cluster answers at 127.0.0.1:{port}" in done.stderr.splitlines()[-1]


def test_a_cluster_that_goes_away(home: Path, tmp_path: Path) -> None:
    command = (*MLOPS, "deploy", "waiting:1.0.0", "--ray-address", "local", "--replicas", "1")
    with ServingProcess(command, tmp_path, home, MLOPS_RAY__ROUTE_PREFIX="/") as server:
        server.wait_until_ready()
        wait_until(lambda: "Ctrl-C" in server.told())
        children = psutil.Process(server.process.pid).children(recursive=True)
        server.seen.update(children)
        for child in children:
            if "gcs_server" in child.name():
                child.kill()
        assert server.wait() == 1
        assert "no Ray cluster answers at" in server.told()


def test_what_the_dry_run_prints_is_what_ray_serve_takes(
    cluster: RayCluster, home: Path, tmp_path: Path
) -> None:
    done = mlops("deploy", "waiting:2.0.0", "--dry-run", "--replicas", "1", "--port",
                 str(cluster.port), home=home, MLOPS_CPU_PER_WORKER="0.2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (tmp_path / "serve.yaml").write_text(done.stdout)
    (application,) = yaml.safe_load(done.stdout)["applications"]
    assert application["name"] == "tests-waiting"
    serve = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()"]
    dashboard = cluster.cluster.webui_url
    subprocess.run(
        [*serve, "deploy", str(tmp_path / "serve.yaml"), "-a", f"http://{dashboard}"],
        check=True,
        capture_output=True,
        timeout=LONG_S,
    )
    try:
        wait_until(lambda: answers(f"{cluster.url}/tests-waiting"))
        told = mlops("status", "--ray-address", cluster.address, "--json", home=home)
        (row,) = json.loads(told.stdout)
        assert (row["bento_tag"], row["status"]) == ("waiting:2.0.0", "RUNNING")
        told = mlops("status", "--ray-address", cluster.address, home=home)
        assert "tests-waiting" in told.stdout and "1 running of 1" in told.stdout
        with pytest.raises(DeploymentError, match="deployed from a file.* change that and apply"):
            deploy("waiting:1.0.0", cluster.settings())
        with pytest.raises(DeploymentError, match="deployed from a file"):
            scale("tests-waiting", 2, cluster.address)
    finally:
        gone = mlops("undeploy", "tests-waiting", "--ray-address", cluster.address, home=home)
    assert gone.returncode == 0, gone.stderr

    # Nor does it come back with a new controller, which reads the file again.
    before = processes("ray::ServeController")  # forks of it among them
    for process in before:
        process.kill()
    wait_until(lambda: set(processes("ray::ServeController")) - set(before))
    assert applications() == {}
    told = mlops("status", "--ray-address", cluster.address, home=home)
    assert "nothing is deployed" in told.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--replicas", "3:1"), "'3:1' replicas are not allowed; use a number from 1 to 1000"),
        (("--replicas", "0"), "'0' replicas are not allowed; use a number from 1 to 1000"),
        (("--backend", "lambda"), "--backend 'lambda' is not allowed; use"),
        (("--route-prefix", "chat"), "--route-prefix 'chat' is not allowed; use"),
        (("--host", "here"), "--host 'here' is not allowed; use"),
        (("--adapter", "formal"), "takes NAME=TAG, not 'formal'"),
        (("--config", "nothing.yaml"), "nothing.yaml cannot be read"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(
    home: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = mlops("deploy", "tiny:1.0.0", "--ray-address", "local", *arguments, home=home)
    is_understood = arguments[0] not in {"--replicas", "--adapter"}
    assert done.returncode == (1 if is_understood else 2)
    assert said in done.stderr
    assert " or None" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == (1 if is_understood else 4)  # with the usage


def test_a_port_that_is_taken(home: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        done = mlops("deploy", "waiting:1.0.0", "--ray-address", "local", "--port", str(port),
                     home=home)  # fmt: skip
    assert done.returncode == 1
    assert f"port {port} cannot be listened on" in done.stderr
