"""Loading a checkpoint, against mlx-lm's own `load` with the weights in memory.

Each load is a process of its own. Both sides are measured in it from the first import to a model
that has computed one token; ours has then also tried the model out, and checked every weight.

    python -m benchmarks.loading COMMIT [--runs N]

measures this working tree against another commit, in turn: what a change costs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.models import CONFIG
from benchmarks.report import HEADER, Figure

SHAPE = {
    **{"hidden_size": 1024, "num_hidden_layers": 22, "intermediate_size": 2816},
    **{"num_attention_heads": 16, "num_key_value_heads": 8},
}
"""1.0 GiB in float32, 0.5 in bfloat16, 0.14 in 4 bits."""

KINDS = ("float32", "bfloat16", "4-bit")

OURS = """
import sys, time
start = time.perf_counter()
from mlops.engine import load_model
load_model(sys.argv[1])
print(time.perf_counter() - start)
"""

MLX_LM = """
import sys, time
start = time.perf_counter()
from mlops.hardware import ensure_blas  # the same BLAS for both
ensure_blas()
import mlx.core as mx
from mlx_lm import load
model, tokenizer = load(sys.argv[1])
mx.eval(model(mx.array([[1]])))
print(time.perf_counter() - start)
"""

ROOT = Path(__file__).parents[1]


def run(runs: int) -> list[Figure]:
    """Measure both sides in turn, with the files in the page cache and from the disk."""
    figures = []
    with tempfile.TemporaryDirectory(prefix="mlops-bench-") as folder:
        _write_models(Path(folder))
        for kind in KINDS:
            for is_cold in (False, True):
                path = Path(folder) / kind
                samples = _in_turn(
                    {"ours": (OURS, ROOT), "peer": (MLX_LM, ROOT)}, path, runs, is_cold
                )
                figures.append(
                    Figure(
                        f"load 1 GiB as {kind}, {'from disk' if is_cold else 'in the page cache'}: "
                        "times as long",
                        "mlx_lm.load and one token",
                        _ratios(samples["ours"], samples["peer"]),
                        raw={f"{side}_s": values for side, values in samples.items()},
                    )
                )
    return figures


def compare(commit: str, runs: int) -> list[Figure]:
    """Measure this working tree against a commit, in turn, with files in the page cache."""
    figures = []
    with tempfile.TemporaryDirectory(prefix="mlops-bench-") as folder, _checkout(commit) as other:
        _write_models(Path(folder))
        for kind in KINDS:
            sides = {"ours": (OURS, ROOT), "commit": (OURS, other)}
            samples = _in_turn(sides, Path(folder) / kind, runs, is_cold=False)
            figures.append(
                Figure(
                    f"load 1 GiB as {kind}: times as long",
                    f"commit {commit}",
                    _ratios(samples["ours"], samples["commit"]),
                    floor=1.1,
                    at_least=False,
                    raw={f"{side}_s": values for side, values in samples.items()},
                )
            )
    return figures


def _ratios(ours: list[float], others: list[float]) -> list[float]:
    return [one / other for one, other in zip(ours, others, strict=True)]


def _in_turn(
    sides: dict[str, tuple[str, Path]], model: Path, runs: int, is_cold: bool
) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {side: [] for side in sides}
    for script, root in sides.values():
        _seconds(script, root, model)  # not counted: bytecode, and the page cache
    for number in range(runs):
        # Who comes second finds a warmer machine: so each is first in turn.
        order = list(sides) if number % 2 == 0 else list(reversed(sides))
        for side in order:
            if is_cold:
                _forget(model)
            samples[side].append(_seconds(*sides[side], model))
    return samples


def _seconds(script: str, root: Path, model: Path) -> float:
    """One load in a process of its own, with the library as it lies in `root`."""
    done = subprocess.run(
        [sys.executable, "-c", script, str(model)],
        env={**os.environ, "PYTHONPATH": str(root / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def _forget(model: Path) -> None:
    """Drop the files from the page cache; where the system cannot be asked to, they stay."""
    for path in model.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _checkout(commit: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mlops-bench-") as folder:
        other = Path(folder) / "other"
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(other), commit], cwd=ROOT, check=True
        )
        try:
            yield other
        finally:
            subprocess.run(
                ["git", "worktree", "remove", "--force", str(other)], cwd=ROOT, check=True
            )


def _write_models(folder: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "benchmarks.loading", "--write", str(folder)], cwd=ROOT, check=True
    )


def _write(folder: Path) -> None:
    from mlops.hardware import ensure_blas

    ensure_blas()
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.utils import quantize_model

    from benchmarks.models import write_checkpoint

    config: dict[str, Any] = {**CONFIG, **SHAPE}
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(config))
    for kind in KINDS:
        if kind == "bfloat16":
            model.set_dtype(mx.bfloat16)
        elif kind == "4-bit":
            model, config = quantize_model(model, config, group_size=64, bits=4)
        write_checkpoint(folder / kind, dict(tree_flatten(model.parameters())), config)


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commit", nargs="?", default="HEAD")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write is not None:
        _write(arguments.write)
        return 0
    figures = compare(arguments.commit, arguments.runs)
    print(HEADER)
    for figure in figures:
        print(figure.row())
        print(json.dumps({key: sorted(map(float, values)) for key, values in figure.raw.items()}))
    return 1 if any(figure.verdict == "MISSED" for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(_main())
