"""Our service against `mlx_lm.server`, over HTTP, with closed-loop clients on the same machine.

Both serve the same random Llama of 29M parameters (`benchmarks.models`) and answer
`/v1/completions` with 64 tokens at temperature 0. Within a run both get the same prompts of 32 to
64 random words; no two prompts begin alike, so neither side can use again what it has cached. Both
are up at the same time and measured in turn, the order changing from run to run.

The peer is `python -m mlx_lm server --decode-concurrency 32` with its other defaults (8 prompts at
once in prefill), started by `mlops run --`, so it computes with the same BLAS. "As installed" is
the same command without `mlops run --`; it is slow, so both sides get one wave of requests and
fewer runs, as they do for adapters. There a request to the peer has the model's path in `model` and
the adapter's in `adapters`; one to ours has the adapter's name in `model`.

*The engine called in process* reads its streams in the process that computes them: as many readers
as there are clients, the same prompts, the same `bentoml serve` waiting idle meanwhile. *Clients at
once* all connect in the same moment; a connection is lost when it ends without an answer.

Times hold what a client sees, with one connection a request, since the peer offers no more. Where
the peer drops a connection the client asks again; `resets` counts these. `same_text` is the share
of the answers that are the same text on both sides; `client_share` what the clients used of a core.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.clients import Round, ask_all
from benchmarks.models import adapter_folders, make_prompts, write_models
from benchmarks.report import Figure
from benchmarks.servers import MAX_ROWS, mlops_server, mlx_lm_server

NUM_TOKENS = 64
NUM_ADAPTERS = 8
NUM_REQUESTS = {16: 48, 32: 96}
"""By clients."""

CROWD = 256
SLOW_RUNS = 2
SLOW_REQUESTS = 16
"""Where the peer needs some 40 s for so many: one wave, and not more than so many runs."""

AS_INSTALLED = "mlx_lm.server as installed"
PEER = "mlx_lm.server"


@dataclass(frozen=True)
class _Server:
    """A server, and how its requests name the model and the adapter."""

    port: int
    naming: Callable[[int], dict[str, str]]

    def ask(self, seed: str, num_requests: int, num_clients: int, stream: bool = False) -> Round:
        return ask_all(
            self.port,
            make_prompts(seed, num_requests),
            self.naming,
            num_clients=num_clients,
            max_tokens=NUM_TOKENS,
            stream=stream,
        )

    def warm_up(self, num_requests: int = 32, max_tokens: int = 16) -> None:
        prompts = make_prompts("warm-up", num_requests)
        ask_all(self.port, prompts, self.naming, num_clients=num_requests, max_tokens=max_tokens)


@dataclass(frozen=True)
class _Pair:
    """What both sides did with the same prompts."""

    ours: Round
    theirs: Round

    @property
    def same_text(self) -> float:
        pairs = zip(self.ours.answers, self.theirs.answers, strict=True)
        return statistics.mean(ours.text == theirs.text for ours, theirs in pairs)


def run(runs: int) -> list[Figure]:
    """Measure all that `mlx_lm.server` can be asked as well."""
    from mlops import hardware

    # Elsewhere MLX is as fast as installed as it is by `mlops run`.
    has_slow_peer = hardware.detect().mlx_backend == "cpu"
    with tempfile.TemporaryDirectory(prefix="mlops-bench-") as name:
        folder = Path(name)
        write_models(folder, NUM_ADAPTERS)
        figures = _measure_base(folder, runs)
        if has_slow_peer:
            figures += _measure_as_installed(folder, min(runs, SLOW_RUNS))
        figures += _measure_adapters(folder, min(runs, SLOW_RUNS))
        figures += _measure_against_engine(folder, runs)
    return figures


def _measure_base(folder: Path, runs: int) -> list[Figure]:
    model = folder / "base"
    throughput: dict[int, list[_Pair]] = {num_clients: [] for num_clients in NUM_REQUESTS}
    streamed = []
    with (
        mlops_server(folder / "ours", model, max_batch_size=MAX_ROWS) as our_port,
        mlx_lm_server(folder / "theirs", model) as their_port,
    ):
        ours, theirs = _Server(our_port, _as_base), _Server(their_port, _as_default)
        ours.warm_up()
        theirs.warm_up()
        for number in range(runs):
            for num_clients, pairs in throughput.items():
                pairs.append(_compare(ours, theirs, number, num_clients))
            streamed.append(_compare(ours, theirs, number, 16, stream=True))
    figures = [
        _throughput(f"{clients} clients, tokens/s: times", PEER, pairs, floor=1.5, aim=2)
        for clients, pairs in throughput.items()
    ]
    our_ms = [statistics.median(pair.ours.first_token_ms) for pair in streamed]
    their_ms = [statistics.median(pair.theirs.first_token_ms) for pair in streamed]
    first_token = Figure(
        "16 clients, streamed, time to first token p50: part",
        PEER,
        [a / b for a, b in zip(our_ms, their_ms, strict=True)],
        floor=1 / 3,
        aim=1 / 6,
        at_least=False,
        raw={"ms": our_ms, "peer_ms": their_ms, **_raw(streamed)},
    )
    return [*figures, first_token]


def _measure_against_engine(folder: Path, runs: int) -> list[Figure]:
    """What HTTP takes away, and whether it loses anybody."""
    over_http, in_process, resets = [], [], []
    with mlops_server(folder / "ours-http", folder / "base", max_batch_size=MAX_ROWS) as port:
        ours = _Server(port, _as_base)
        ours.warm_up()
        for number in range(runs):
            seed, count = f"in process, run {number}", NUM_REQUESTS[32]
            over_http.append(ours.ask(seed, count, 32, stream=True).tokens_per_s)
            in_process.append(_tokens_per_s_in_process(folder, seed, count))
            prompts = make_prompts(f"crowd {number}", CROWD)
            crowd = ask_all(port, prompts, _as_base, num_clients=CROWD, max_tokens=4)
            resets.append(float(crowd.num_resets))
    return [
        Figure(
            "32 streams over HTTP, tokens/s: part",
            "the engine called in process",
            [a / b for a, b in zip(over_http, in_process, strict=True)],
            floor=0.92,
            aim=0.97,
            raw={"tokens_per_s": over_http, "in_process_tokens_per_s": in_process},
        ),
        Figure(
            f"connections lost, {CROWD} clients at once", "", resets, floor=0, aim=0, at_least=False
        ),
    ]


def _tokens_per_s_in_process(folder: Path, seed: str, num_requests: int) -> float:
    command = [sys.executable, "-m", "benchmarks.in_process", "streams", str(folder), seed]
    command += [str(num_requests), str(MAX_ROWS)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True
    )
    return float(done.stdout.splitlines()[-1])


def _measure_as_installed(folder: Path, runs: int) -> list[Figure]:
    figures = []
    for kind, model in (("float32", folder / "base"), ("4-bit checkpoint", folder / "base-4bit")):
        pairs = []
        with (
            mlops_server(folder / f"ours-{kind}", model, max_batch_size=MAX_ROWS) as our_port,
            mlx_lm_server(folder / f"theirs-{kind}", model, as_installed=True) as their_port,
        ):
            ours, theirs = _Server(our_port, _as_base), _Server(their_port, _as_default)
            ours.warm_up()
            theirs.warm_up(num_requests=16, max_tokens=2)
            for number in range(runs):
                pairs.append(_compare(ours, theirs, number, 16, num_requests=SLOW_REQUESTS))
        name = f"16 clients, {kind}, tokens/s: times"
        figures.append(_throughput(name, AS_INSTALLED, pairs, floor=12, aim=20))
    return figures


def _measure_adapters(folder: Path, runs: int) -> list[Figure]:
    model, adapters = folder / "base", adapter_folders(folder, NUM_ADAPTERS)
    names = list(adapters)

    def as_adapter(number: int) -> dict[str, str]:
        return {"model": names[number % NUM_ADAPTERS]}

    def as_path(number: int) -> dict[str, str]:
        return {"model": str(model), "adapters": str(adapters[names[number % NUM_ADAPTERS]])}

    pairs = []
    with (
        mlops_server(
            folder / "ours-adapters", model, adapters=adapters, max_batch_size=MAX_ROWS
        ) as our_port,
        mlx_lm_server(folder / "theirs-adapters", model) as their_port,
    ):
        ours, theirs = _Server(our_port, as_adapter), _Server(their_port, as_path)
        _check_adapters_work(ours, _Server(our_port, _as_base))
        ours.warm_up()
        theirs.warm_up(num_requests=2)
        for number in range(runs):
            pairs.append(_compare(ours, theirs, number, 16, num_requests=SLOW_REQUESTS))
    name = f"16 clients, {NUM_ADAPTERS} adapters in turn, tokens/s: times"
    return [_throughput(name, PEER, pairs, floor=8, aim=12)]


def _compare(
    ours: _Server,
    theirs: _Server,
    number: int,
    num_clients: int,
    *,
    num_requests: int | None = None,
    stream: bool = False,
) -> _Pair:
    """Ask both the same; ours first in runs of even number."""
    seed = f"run {number}, {num_clients} clients, {stream}"
    count = num_requests or NUM_REQUESTS[num_clients]
    order = (ours, theirs) if number % 2 == 0 else (theirs, ours)
    first, second = (server.ask(seed, count, num_clients, stream) for server in order)
    return _Pair(first, second) if order[0] is ours else _Pair(second, first)


def _check_adapters_work(adapted: _Server, base: _Server) -> None:
    """An adapter that is not applied is fast, and no answer to the question."""
    pairs = zip(adapted.ask("check", 8, 8).answers, base.ask("check", 8, 8).answers, strict=True)
    for one, other in pairs:
        if one.text == other.text:
            raise SystemExit("an adapter answers as the base model does")


def _throughput(name: str, peer: str, pairs: list[_Pair], *, floor: float, aim: float) -> Figure:
    return Figure(
        name,
        peer,
        [pair.ours.tokens_per_s / pair.theirs.tokens_per_s for pair in pairs],
        floor=floor,
        aim=aim,
        raw={
            "tokens_per_s": [pair.ours.tokens_per_s for pair in pairs],
            "peer_tokens_per_s": [pair.theirs.tokens_per_s for pair in pairs],
            **_raw(pairs),
        },
    )


def _raw(pairs: list[_Pair]) -> dict[str, list[float]]:
    return {
        "resets": [pair.ours.num_resets for pair in pairs],
        "peer_resets": [pair.theirs.num_resets for pair in pairs],
        "client_share": [pair.ours.client_share for pair in pairs],
        "peer_client_share": [pair.theirs.client_share for pair in pairs],
        "same_text": [pair.same_text for pair in pairs],
    }


def _as_base(_number: int) -> dict[str, str]:
    return {"model": "base"}


def _as_default(_number: int) -> dict[str, str]:
    return {}  # the peer's `default_model`
