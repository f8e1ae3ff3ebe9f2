"""`mlops demo --ray`: the demo's Bento on a Ray cluster of two nodes on this machine.

two `ray start` -> deploy, two replicas -> who answers for which adapter
-> a replica is killed -> an update while clients ask -> the end of both nodes
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mlops.counts import count
from mlops.demo import service
from mlops.demo.lessons import LESSONS
from mlops.demo.run import ask_everything, wait_for_interrupt
from mlops.errors import MissingDependencyError, MLOpsError, ServiceError

QUESTION = "What is a list?"
CLIENTS = 4
START_S = 60.0


def show_cluster(bento_tag: str, folder: Path, console: Console, keep_serving: bool) -> None:
    """Deploy, ask, kill, update; see the module.

    Raises:
        MLOpsError: a step failed; says which and why.
    """
    from mlops.serving.ray import deploy

    console.rule("4. A Ray cluster of two nodes", align="left")
    settings: dict[str, Any] = {
        "serving_backend": "hybrid",
        "ray_min_replicas": 2,
        "ray_max_replicas": 2,
        "cpu_per_worker": 0.9,  # a node has one: so each node gets a replica
        "port": service.free_port(),
        "ray": {"max_surge_percent": 0},
    }
    with _cluster(folder, console) as address:
        settings["ray_address"] = address
        with console.status(f"mlops deploy {bento_tag} …") as status:
            deployed = deploy(
                bento_tag,
                settings,
                progress=lambda state: status.update(f"mlops deploy {bento_tag}: {state}"),
            )
        console.print(f"{bento_tag} answers at {deployed.url}")
        console.print(f"Ray's dashboard: {deployed.dashboard_url}   logs: {deployed.log_folder}")

        console.rule("5. Ask over HTTP", align="left")
        console.print(ask_everything(deployed.url))
        _show_who_answers(console, deployed.url)

        console.rule("6. A replica is killed", align="left")
        with _asking(deployed.url) as seen:
            _kill_one(console, deployed.url)
        _tell(console, seen)

        console.rule("7. An update while clients ask", align="left")
        with _asking(deployed.url) as seen, console.status("mlops deploy …") as status:
            deploy(
                bento_tag,
                {**settings, "max_batch_size": 16},
                progress=lambda state: status.update(f"another batch size: {state}"),
            )
        _tell(console, seen)
        if seen["lost"]:
            raise ServiceError(f"the update lost {count(seen['lost'], 'request')}", "demo")
        if keep_serving:
            wait_for_interrupt(console, deployed.url)


@contextlib.contextmanager
def _cluster(folder: Path, console: Console) -> Iterator[str]:
    """Two nodes of one core each; gives the address, and ends both."""
    from mlops.serving.ray.cluster import use_token

    use_token()
    try:
        import ray
    except ImportError as exc:
        raise MissingDependencyError("ray", "ray") from exc
    address = f"127.0.0.1:{service.free_port()}"
    port = address.partition(":")[2]
    with contextlib.ExitStack() as nodes, console.status("ray start --head …") as status:
        head = ["--head", "--port", port, "--dashboard-port", str(service.free_port())]
        nodes.enter_context(_node(folder / "ray-head.log", head))
        deadline = time.monotonic() + START_S
        # Not by connecting: Ray looks for its token once, and the head makes that when it starts.
        while "Ray runtime started" not in (folder / "ray-head.log").read_text():
            if time.monotonic() > deadline:
                raise ServiceError(f"Ray did not start; see {folder / 'ray-head.log'}", "demo")
            time.sleep(0.2)
        status.update("ray start, the second node …")
        nodes.enter_context(_node(folder / "ray-node.log", ["--address", address]))
        ray.init(address, log_to_driver=False, logging_level="error", ignore_reinit_error=True)
        nodes.callback(ray.shutdown)
        while len([node for node in ray.nodes() if node["Alive"]]) < 2:
            if time.monotonic() > deadline:
                raise ServiceError(f"a node did not come; see {folder / 'ray-node.log'}", "demo")
            time.sleep(0.5)
        status.stop()
        console.print(f"ray start --head --port {port}\nray start --address {address}")
        yield address


@contextlib.contextmanager
def _node(log: Path, options: Sequence[str]) -> Iterator[None]:
    from mlops.serving.ray.cluster import SERVING_ENVIRONMENT

    command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start"]
    command += ["--block", "--num-cpus", "1", "--disable-usage-stats"]
    command += ["--node-ip-address", "127.0.0.1", *options]
    environment = {**SERVING_ENVIRONMENT, **os.environ}
    with log.open("w") as output:
        node = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield
    finally:
        node.terminate()
        try:
            node.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()


def _show_who_answers(console: Console, url: str) -> None:
    """From the replicas' own counters: each adapter has one of them."""
    for _ in range(4):
        for lesson in LESSONS:
            service.ask(url, text=QUESTION, adapter=lesson.name, max_tokens=4)
    table = Table("replica (process)", "answers for")
    for process_id, names in sorted(_replicas(url, 2).items()):
        table.add_row(str(process_id), ", ".join(names) or "the base alone")
    console.print(table)


def _replicas(url: str, number: int) -> dict[int, list[str]]:
    """Adapters that each replica has answered for; a request reaches any of them."""
    found: dict[int, list[str]] = {}
    deadline = time.monotonic() + START_S
    while len(found) < number:
        if time.monotonic() > deadline:
            raise ServiceError(f"{len(found)} of {number} replicas answer", "demo")
        metrics = service.metrics(url)
        counts = metrics["engine"]["adapters"]
        names = [one.name for one in LESSONS if counts.get(one.name, {}).get("completion_tokens")]
        found[metrics["process_id"]] = names
    return found


def _kill_one(console: Console, url: str) -> None:
    process_id = min(_replicas(url, 2))
    killed_s = time.monotonic()
    os.kill(process_id, signal.SIGKILL)
    console.print(f"kill -9 {process_id}")
    deadline = killed_s + START_S
    while len(others := [one for one in _replicas(url, 1) if one != process_id]) < 1:
        if time.monotonic() > deadline:
            raise ServiceError("no replica answers any more", "demo")
    console.print(f"the other one, {others[0]}, goes on; waiting for a new one")
    while len([one for one in _replicas(url, 2) if one != process_id]) < 2:
        pass
    console.print(f"two replicas again after {time.monotonic() - killed_s:.0f} s")


@contextlib.contextmanager
def _asking(url: str) -> Iterator[Counter[str]]:
    """Clients that ask as long as the block runs; counts `answered` and `lost`."""
    seen: Counter[str] = Counter(answered=0, lost=0)
    stopped, lock = threading.Event(), threading.Lock()

    def ask() -> None:
        while not stopped.is_set():
            try:
                service.ask(url, text=QUESTION, max_tokens=4)
                outcome = "answered"
            except MLOpsError:
                outcome = "lost"
            with lock:
                seen[outcome] += 1

    threads = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


def _tell(console: Console, seen: Counter[str]) -> None:
    console.print(
        f"meanwhile {CLIENTS} clients got {seen['answered']} answers and lost {seen['lost']}"
    )
