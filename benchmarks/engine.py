"""The engine in process: against mlx-lm, and against itself without what it has to pay for.

Every run is a process of its own (`benchmarks.in_process`), which measures both sides in turn with
the same random Llama of 29M parameters in float32, the same prompts of 32 to 64 tokens, 64 new
tokens at temperature 0, warm, with the same BLAS.

- *offline*: 16 prompts at once, from the first to the last token, against `batch_generate` with 16
  rows in decoding and its default of 8 in prefill.
- *one stream alone*: 128 tokens, against `stream_generate`.
- *adapters*: LoRA of rank 8 on all linears, a different one from row to row; against base rows in
  the same engine with the same adapters resident.
- *adapters enabled, none used*: base rows, against an engine that never had an adapter.
- *repeated prefix*: time to first token of a prompt whose first 1,000 of 1,016 tokens were seen
  before, against the first time.
- *overhead*: a decode step of the engine at 32 rows, less the same step of its model and caches
  alone at the same lengths, as a part of the latter.
- *memory*: MLX's active bytes with 64 adapters resident, over base and adapter files together.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.models import write_models
from benchmarks.report import Figure

NUM_ADAPTERS = 64

Raw = dict[str, float]
"""What one run measured for one figure, by name."""


def run(runs: int) -> list[Figure]:
    """Measure each figure once a run."""
    with tempfile.TemporaryDirectory(prefix="mlops-bench-") as name:
        folder = Path(name)
        write_models(folder, NUM_ADAPTERS)
        found = [
            _measure("throughput", folder, f"run {number}") | _measure("memory", folder)
            for number in range(runs)
        ]

    def figure(
        key: str,
        name: str,
        peer: str,
        value: Callable[[Raw], float],
        *,
        floor: float,
        aim: float,
        at_least: bool = True,
    ) -> Figure:
        measured = [one[key] for one in found]
        raw = {field: [one[field] for one in measured] for field in measured[0]}
        samples = [value(one) for one in measured]
        return Figure(name, peer, samples, floor, at_least, raw, aim)

    return [
        figure(
            "offline",
            "16 prompts offline, tokens/s: times",
            "mlx_lm.batch_generate",
            lambda raw: raw["our_tokens_per_s"] / raw["peer_tokens_per_s"],
            floor=1.15,
            aim=1.5,
        ),
        figure(
            "alone",
            "one stream alone, tokens/s: times",
            "mlx_lm.stream_generate",
            lambda raw: raw["our_tokens_per_s"] / raw["peer_tokens_per_s"],
            floor=1.0,
            aim=1.5,
        ),
        figure(
            "mixed_8",
            "8 adapters in 16 rows, tokens/s: part",
            "base rows, same engine",
            lambda raw: raw["mixed_tokens_per_s"] / raw["base_tokens_per_s"],
            floor=0.8,
            aim=0.9,
        ),
        figure(
            "mixed_64",
            "64 adapters in 64 rows, tokens/s: part",
            "base rows, same engine",
            lambda raw: raw["mixed_tokens_per_s"] / raw["base_tokens_per_s"],
            floor=0.65,
            aim=0.8,
        ),
        figure(
            "unused",
            "adapters enabled, none used, tokens/s: part",
            "an engine without adapters",
            lambda raw: raw["enabled_tokens_per_s"] / raw["disabled_tokens_per_s"],
            floor=0.98,
            aim=1.0,
        ),
        figure(
            "prefix",
            "1,000-token prefix repeated, time to first token: part",
            "the prefix when new",
            lambda raw: raw["repeated_ms"] / raw["cold_ms"],
            floor=0.2,
            aim=0.1,
            at_least=False,
        ),
        figure(
            "overhead",
            "engine overhead of a decode step at 32 rows: part",
            "the model's forward alone",
            lambda raw: raw["step_ms"] / raw["forward_ms"] - 1,
            floor=0.1,
            aim=0.05,
            at_least=False,
        ),
        figure(
            "memory",
            "memory with 64 adapters resident: times",
            "base and adapter files",
            lambda raw: raw["active_bytes"] / (raw["base_bytes"] + raw["files_bytes"]),
            floor=1.15,
            aim=1.05,
            at_least=False,
        ),
    ]


def _measure(*arguments: str | Path) -> dict[str, Raw]:
    """One run, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.in_process", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True
    )
    measured: dict[str, Raw] = json.loads(done.stdout.splitlines()[-1])
    return measured
