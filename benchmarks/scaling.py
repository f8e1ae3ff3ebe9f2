"""What Ray Serve costs and brings: `make bench-ray`.

Each deployment is `mlops deploy --ray-address local` on this machine, with a cluster of its own.

- *One replica*: the same Bento of the random Llama of `benchmarks.models` under `bentoml serve` and
  on Ray Serve with one replica, both up, asked in turn by 16 clients, answers whole and streamed.
- *Two replicas*: a runner that sleeps 20 ms for each request, one after the other, as two
  deployments of one cluster, one replica and two.
- *Affinity*: 16 adapters, two replicas that hold 8 each; requests for adapters in random order.
- *Update*: 8 clients ask all the time while a new version is deployed.
- *Burst*: `BURST` requests wait at once behind 64 clients; a deployment of 1 to 4 replicas against
  one of 4, both from nothing to do.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.clients import ask_all
from benchmarks.load import put_load
from benchmarks.models import adapter_folders, make_prompts, write_models
from benchmarks.report import Figure
from benchmarks.servers import END_S, MAX_ROWS, REPOSITORY, running

NUM_CLIENTS = 16
NUM_TOKENS = 64
NUM_REQUESTS = 48
SLEEP_S = 0.02
SLEEP_CLIENTS = 32
"""Two batches for each of two replicas: one runs, the next one waits."""
NUM_SLEEPS = 1000
NUM_ADAPTERS = 16
NUM_RESIDENT = 8
NUM_ASKED = 640
BURST = 6000
BURST_CLIENTS = 64
BURST_REPLICAS = 4
UPDATE_CLIENTS = 8
SMALL = 0.1
"""Cores that a sleeping replica asks Ray for: more of them than cores fit then."""

_SLEEPING = """
import time
from mlops.serving.bentoml.service import create_bentoml_service

class Sleeping:
    def __init__(self, model_path):
        self.is_loaded = False

    def load_model(self):
        self.is_loaded = True

    def predict(self, input_data):
        return self.predict_batch([input_data])[0]

    def predict_batch(self, inputs):
        time.sleep({sleep_s} * len(inputs))
        return [{{"prediction": {version!r}}} for _ in inputs]

    def get_memory_usage(self):
        return {{}}

    def unload_model(self):
        self.is_loaded = False

svc = create_bentoml_service(".", "sleeping", runner_class=Sleeping, config={{}})
"""


def run(runs: int) -> list[Figure]:
    """All of it; what is counted rather than timed is measured once."""
    with tempfile.TemporaryDirectory(prefix="mlops-bench-") as name:
        folder = Path(name)
        home = folder / "home"
        write_models(folder, NUM_ADAPTERS)
        _package(folder, home)
        return [
            *_measure_one_replica(folder, home, runs),
            *_measure_sleeping(folder, home, runs),
            _measure_affinity(folder, home),
        ]


def _measure_one_replica(folder: Path, home: Path, runs: int) -> list[Figure]:
    settings = {"cpu_per_worker": float(os.cpu_count() or 1), "max_batch_size": MAX_ROWS}
    rates: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    bento = [sys.executable, "-m", "bentoml", "serve", "llama:1.0.0"]
    with (
        _deployed(folder, home, "llama:1.0.0", settings, replicas="1") as on_ray,
        running(bento, _new(folder, "bento-"), "/readyz", _environment(home)) as alone,
    ):
        for port in (on_ray.port, alone):
            _tokens_per_s(port, "warm-up", stream=False)
        for number in range(runs):
            for stream, pairs in rates.items():
                seed = f"run {number}, {stream}"
                order = (on_ray.port, alone) if number % 2 == 0 else (alone, on_ray.port)
                found = {port: _tokens_per_s(port, seed, stream=stream) for port in order}
                pairs.append((found[on_ray.port], found[alone]))
    return [
        Figure(
            f"one replica on Ray Serve, {NUM_CLIENTS} clients{kind}, tokens/s: part",
            "the same Bento under bentoml serve",
            [ours / theirs for ours, theirs in rates[stream]],
            floor=0.85,
            aim=0.95,
            raw={
                "tokens_per_s": [ours for ours, _ in rates[stream]],
                "bentoml_tokens_per_s": [theirs for _, theirs in rates[stream]],
            },
        )
        for stream, kind in ((False, ""), (True, ", streamed"))
    ]


def _tokens_per_s(port: int, seed: str, *, stream: bool) -> float:
    return ask_all(
        port,
        make_prompts(seed, NUM_REQUESTS),
        lambda _: {"model": "llama"},
        num_clients=NUM_CLIENTS,
        max_tokens=NUM_TOKENS,
        stream=stream,
    ).tokens_per_s


def _measure_sleeping(folder: Path, home: Path, runs: int) -> list[Figure]:
    settings = {"cpu_per_worker": SMALL, "max_batch_size": 8}
    scaling, bursts, lost = [], [], []
    with _deployed(folder, home, "sleeping:1.0.0", settings, replicas="1") as cluster:
        for number in range(runs):
            rates = {}
            for replicas in (1, 2):
                cluster.scale(str(replicas))
                load = put_load(
                    cluster.port, "/predict", SLEEP_CLIENTS, NUM_SLEEPS * replicas, {"input": 1}
                )
                rates[replicas] = load.requests_per_s
            scaling.append((rates[2], rates[1]))
            versions = ("sleeping:2.0.0", "sleeping:1.0.0")
            lost.append(_lost_in_update(cluster, versions[number % 2], settings))
    for number in range(runs):
        bursts.append(_measure_burst(folder, home, number))
    return [
        Figure(
            f"two replicas, {SLEEP_S * 1000:g} ms of sleep a request, requests/s: times",
            "one replica",
            [two / one for two, one in scaling],
            floor=1.8,
            aim=1.95,
            raw={"requests_per_s": [a for a, _ in scaling], "one": [b for _, b in scaling]},
        ),
        Figure(
            f"requests lost in an update under {UPDATE_CLIENTS} clients",
            "",
            [float(one["lost"]) for one in lost],
            floor=0,
            aim=0,
            at_least=False,
            raw={"requests": [float(one["all"]) for one in lost]},
        ),
        Figure(
            f"burst of {BURST} requests, 1 to {BURST_REPLICAS} replicas, time to its end: times",
            f"{BURST_REPLICAS} replicas from the start",
            [scaled / fixed for scaled, fixed in bursts],
            floor=2,
            aim=1.3,
            at_least=False,
            raw={"s": [a for a, _ in bursts], "fixed_s": [b for _, b in bursts]},
        ),
    ]


def _lost_in_update(cluster: _Deployed, tag: str, settings: Mapping[str, Any]) -> Counter[str]:
    """Requests in all, and those that did not succeed, while `tag` is deployed."""
    seen, stopped, lock = Counter[str](), threading.Event(), threading.Lock()

    def ask() -> None:
        with httpx.Client(timeout=60, trust_env=False) as client:
            while not stopped.is_set():
                try:
                    url = f"http://127.0.0.1:{cluster.port}/predict"
                    is_lost = not client.post(url, json={"input": 1}).is_success
                except httpx.TransportError:
                    is_lost = True
                with lock:
                    seen["all"] += 1
                    seen["lost"] += is_lost

    with ThreadPoolExecutor(UPDATE_CLIENTS) as clients:
        for _ in range(UPDATE_CLIENTS):
            clients.submit(ask)
        try:
            cluster.update(tag, settings)
            time.sleep(1)
        finally:
            stopped.set()
    return seen


def _measure_burst(folder: Path, home: Path, number: int) -> tuple[float, float]:
    """Seconds until the burst is answered: with 1 to 4 replicas, and with 4."""
    scaling = {"upscale_delay_s": 0.0, "target_ongoing_requests": 4.0}
    elapsed = {}
    kinds = [f"1:{BURST_REPLICAS}", str(BURST_REPLICAS)]
    for replicas in kinds if number % 2 == 0 else reversed(kinds):
        settings = {"cpu_per_worker": SMALL, "max_batch_size": 8, "ray": scaling}
        with _deployed(folder, home, "sleeping:1.0.0", settings, replicas=replicas) as cluster:
            load = put_load(cluster.port, "/predict", BURST_CLIENTS, BURST, {"input": 1})
            elapsed[replicas] = load.elapsed_s
    return elapsed[kinds[0]], elapsed[kinds[1]]


def _measure_affinity(folder: Path, home: Path) -> Figure:
    loads = {
        has_affinity: _count_loads(folder, home, has_affinity) for has_affinity in (True, False)
    }
    return Figure(
        f"{NUM_ADAPTERS} adapters, 2 replicas that hold {NUM_RESIDENT}, {NUM_ASKED} requests: "
        "adapters loaded, part",
        "without affinity",
        [loads[True] / loads[False]],
        floor=1 / 4,
        aim=1 / 10,
        at_least=False,
        raw={"loads": [loads[True]], "loads_without": [loads[False]]},
    )


def _count_loads(folder: Path, home: Path, has_affinity: bool) -> float:
    settings = {
        "cpu_per_worker": 0.5,
        "max_resident_adapters": NUM_RESIDENT,
        "ray": {"adapter_affinity": has_affinity},
    }
    source = random.Random(0)  # noqa: S311 - the same requests on both sides
    asked = [f"a{source.randrange(NUM_ADAPTERS)}" for _ in range(NUM_ASKED)]
    with (
        _deployed(folder, home, "llama:1.0.0", settings, replicas="2") as cluster,
        httpx.Client(timeout=120, trust_env=False) as client,
        ThreadPoolExecutor(4) as clients,
    ):
        url = f"http://127.0.0.1:{cluster.port}"

        def ask(adapter: str) -> None:
            body = {"text": "a", "max_tokens": 2, "adapter": adapter}
            client.post(f"{url}/predict", json=body).raise_for_status()

        before = _loads_by_process(client, url)
        list(clients.map(ask, asked))
        after = _loads_by_process(client, url)
    return sum(after.values()) - sum(before.values())


def _loads_by_process(client: httpx.Client, url: str) -> dict[int, float]:
    """Adapters loaded so far by each of two replicas; a request reaches one of them."""
    found: dict[int, float] = {}
    while len(found) < 2:
        metrics = client.get(f"{url}/metrics").json()
        found[metrics["process_id"]] = metrics["engine"]["resident_adapters"]["loads"]
    return found


@dataclass(frozen=True)
class _Deployed:
    """A deployment on a cluster of its own."""

    port: int
    folder: Path
    environment: Mapping[str, str]

    def scale(self, replicas: str) -> None:
        """Change how many replicas there are, and wait for it."""
        self._mlops("scale", "sleeping", replicas)
        url = f"http://127.0.0.1:{self.port}/readyz"
        httpx.get(url, trust_env=False).raise_for_status()

    def update(self, tag: str, settings: Mapping[str, Any]) -> None:
        """Deploy another version."""
        config = _write_config(self.folder, settings)
        self._mlops("deploy", tag, "--config", str(config), "--replicas", "2")

    def _address(self) -> str:
        """Of the cluster; it is told a moment after the service answers."""
        give_up_s = time.monotonic() + END_S
        while time.monotonic() < give_up_s:
            if told := re.search(r"cluster +(\S+:\d+)", (self.folder / "log").read_text()):
                return told[1]
            time.sleep(0.1)
        raise SystemExit("the deployment does not say where its cluster is")

    def _mlops(self, *arguments: str) -> None:
        command = [sys.executable, "-c", "from mlops.cli import main; main()", *arguments]
        command += ["--ray-address", self._address()]
        environment = {**os.environ, **self.environment}
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def _deployed(
    folder: Path, home: Path, tag: str, settings: Mapping[str, Any], *, replicas: str
) -> Iterator[_Deployed]:
    """Deploy a Bento on a cluster that is started for it; its path is `/`."""
    place = _new(folder, "ray-")
    config = _write_config(place, settings)
    environment = _environment(home)
    command = [sys.executable, "-c", "from mlops.cli import main; main()", "deploy", tag]
    command += ["--ray-address", "local", "--config", str(config), "--replicas", replicas]
    with running(command, place, "/readyz", environment) as port:
        yield _Deployed(port, place, environment)


def _new(folder: Path, prefix: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=prefix, dir=folder))


def _write_config(folder: Path, settings: Mapping[str, Any]) -> Path:
    ray = {"route_prefix": "/", **settings.get("ray", {})}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({**settings, "ray": ray}))
    return config


def _environment(home: Path) -> dict[str, str]:
    return {
        "BENTOML_HOME": str(home),
        "BENTOML_DO_NOT_TRACK": "True",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(REPOSITORY),
    }


def _package(folder: Path, home: Path) -> None:
    """Make the Bentos, each in a process of its own."""
    environment = {**os.environ, **_environment(home)}
    adapters = {name: str(path) for name, path in adapter_folders(folder, NUM_ADAPTERS).items()}
    source = (
        "import json, sys\n"
        "from mlops.serving.bentoml.packager import package_model\n"
        "package_model(sys.argv[1], 'llama', model_version='1.0.0',"
        " adapters=json.loads(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", source, str(folder / "base"), json.dumps(adapters)]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    for version in ("1.0.0", "2.0.0"):
        context = folder / f"sleeping-{version}"
        context.mkdir()
        (context / "service.py").write_text(_SLEEPING.format(sleep_s=SLEEP_S, version=version))
        (context / "bentofile.yaml").write_text(
            "service: service:svc\nname: sleeping\ninclude: [service.py]\n"
            "python: {lock_packages: false}\n"
        )
        command = [sys.executable, "-m", "bentoml", "build", "--version", version]
        subprocess.run(command, cwd=context, env=environment, check=True, stdout=subprocess.DEVNULL)
