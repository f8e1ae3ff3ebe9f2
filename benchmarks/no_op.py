"""What serving costs: requests and streams that need no computing, against other servers.

All are up at the same time, one process each that answers, and are asked in short turns by one
client process (`benchmarks.load`) at 16 clients, or with 64 streams of 64 tokens, each an event:

- *plain BentoML*: a service with one `@bentoml.api`, under `bentoml serve`, as ours is;
- *LitServe*: a `LitAPI` on one worker, with `fast_queue=True`;
- *FastAPI*: the handler alone, on uvicorn.

Each gives the same JSON for the same body. `client_share` says what the client used of its core.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.load import Load, put_load
from benchmarks.peers import NUM_TOKENS, PLAIN_BENTOML
from benchmarks.report import Figure
from benchmarks.servers import bentoml_server, peer_server

NUM_CLIENTS = 16
NUM_REQUESTS = 3000
NUM_STREAMS = 64
NUM_ANSWERS = 256
TURNS = 3
"""Of every server within a run."""

BODY = {"text": "What is a list?", "max_tokens": 10}
OURS, PLAIN, LITSERVE, FASTAPI = "ours", "@bentoml.api", "LitServe", "FastAPI on uvicorn"


def run(runs: int) -> list[Figure]:
    """Ask every server in turn."""
    with tempfile.TemporaryDirectory(prefix="mlops-bench-") as folder:
        with _servers(Path(folder, "answers")) as ports:
            answers = [_ask_in_turn(ports, NUM_CLIENTS, NUM_REQUESTS) for _ in range(runs)]
        with _streaming_servers(Path(folder, "streams")) as ports:
            streams = [_ask_in_turn(ports, NUM_STREAMS, NUM_ANSWERS) for _ in range(runs)]
    figures = [
        _figure(f"no-op /predict, {NUM_CLIENTS} clients, requests/s: times", peer, answers, *aims)
        for peer, aims in ((PLAIN, (1.5, 4)), (LITSERVE, (2, 5)), (FASTAPI, (0.25, 0.6)))
    ]
    name = f"no-op, {NUM_STREAMS} streams, tokens/s: times"
    return [*figures, _figure(name, LITSERVE, streams, 1, 2)]


def _figure(
    name: str, peer: str, measured: list[dict[str, list[Load]]], floor: float, aim: float
) -> Figure:
    def rate(loads: list[Load]) -> float:
        return statistics.median(load.requests_per_s for load in loads)

    ours, theirs = ([rate(one[side]) for one in measured] for side in (OURS, peer))
    shares = [
        max(load.client_share for loads in one.values() for load in loads) for one in measured
    ]
    return Figure(
        name,
        peer,
        [a / b for a, b in zip(ours, theirs, strict=True)],
        floor=floor,
        aim=aim,
        raw={"requests_per_s": ours, "peer_requests_per_s": theirs, "client_share": shares},
    )


def _ask_in_turn(
    ports: dict[str, int], num_clients: int, num_requests: int
) -> dict[str, list[Load]]:
    body: dict[str, Any] = {**BODY, "stream": True} if num_clients == NUM_STREAMS else BODY
    found: dict[str, list[Load]] = {name: [] for name in ports}
    for port in ports.values():
        put_load(port, "/predict", num_clients, num_requests // 10, body)
    for _ in range(TURNS):
        for name, port in ports.items():
            load = put_load(port, "/predict", num_clients, num_requests, body)
            if "stream" in body and load.num_events < NUM_TOKENS * num_requests:
                raise SystemExit(f"{name}: {load.num_events} events of {num_requests} streams")
            found[name].append(load)
    return found


@contextlib.contextmanager
def _servers(folder: Path) -> Iterator[dict[str, int]]:
    with (
        bentoml_server(folder / "ours", _ours("NoOpRunner")) as ours,
        bentoml_server(folder / "plain", PLAIN_BENTOML) as plain,
        peer_server(folder / "litserve", "benchmarks.litserve_peer") as litserve,
        peer_server(folder / "fastapi", "benchmarks.peers") as fastapi,
    ):
        yield {OURS: ours, PLAIN: plain, LITSERVE: litserve, FASTAPI: fastapi}


@contextlib.contextmanager
def _streaming_servers(folder: Path) -> Iterator[dict[str, int]]:
    with (
        bentoml_server(folder / "ours", _ours("NoOpTextRunner")) as ours,
        peer_server(folder / "litserve", "benchmarks.litserve_peer", "--stream") as litserve,
    ):
        yield {OURS: ours, LITSERVE: litserve}


def _ours(runner: str) -> str:
    return (
        f"from benchmarks.no_op_runner import {runner}\n"
        "from mlops.serving.bentoml.service import create_bentoml_service\n"
        f"svc = create_bentoml_service('.', 'bench', runner_class={runner})\n"
    )
