"""Storing 1 GiB of weights, against `bentoml.models.create` with a copy.

Each side runs in a process of its own with an empty store. Bytes written are the operating
system's count for that process (`wchar` of /proc/self/io), so they hold what went to temporary
folders too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.report import Figure

MODEL_BYTES = 2**30
MIB = 2**20

COUNT = """
import json, os, shutil, sys, time
from pathlib import Path
import bentoml
from mlops.registry import ModelStore

source = Path(sys.argv[1])

def written():
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("wchar"):
            return int(line.split()[1])

def measure(work):
    before, start = written(), time.perf_counter()
    work()
    seconds, num_bytes = time.perf_counter() - start, written() - before
    entries = Path(os.environ["BENTOML_HOME"]) / "models"
    stored = sum(path.stat().st_size for path in entries.rglob("*") if path.is_file())
    return {"seconds": seconds, "bytes": num_bytes, "stored": stored}
"""

OURS = (
    COUNT
    + """
def save():
    files = [(path.name, path) for path in sorted(source.iterdir())]
    ModelStore().save("bench", "1.0.0", files, kind="language_model", framework="mlx")

def save_as_another():
    files = [(path.name, path) for path in sorted(source.iterdir())]
    ModelStore().save("other", "1.0.0", files, kind="language_model", framework="mlx")

print(json.dumps([measure(save), measure(save_as_another)]))
"""
)

BENTOML = (
    COUNT
    + """
def create():
    with bentoml.models.create("bench:1.0.0") as model:
        shutil.copytree(source, model.path, dirs_exist_ok=True)

print(json.dumps([measure(create)]))
"""
)


def run(runs: int) -> list[Figure]:
    """Measure both sides in turn."""
    with tempfile.TemporaryDirectory(prefix="mlops-bench-") as folder:
        source = Path(folder) / "model"
        source.mkdir()
        (source / "config.json").write_text("{}")
        with (source / "model.safetensors").open("wb") as file:
            for _ in range(MODEL_BYTES // (64 * MIB)):
                file.write(os.urandom(64 * MIB))
        ours, again, theirs = [], [], []
        for _ in range(runs):
            first, second = _measure(OURS, source, folder)
            ours.append(first)
            again.append(second)
            theirs.append(_measure(BENTOML, source, folder)[0])
    raw = {
        "seconds": [one["seconds"] for one in ours],
        "bentoml_seconds": [one["seconds"] for one in theirs],
    }
    return [
        Figure(
            "store 1 GiB: times faster",
            "bentoml.models.create and a copy",
            [b["seconds"] / a["seconds"] for a, b in zip(ours, theirs, strict=True)],
            floor=2.5,
            raw=raw,
        ),
        Figure(
            "bytes written per stored byte",
            "(bytes)",
            [one["bytes"] / one["stored"] for one in ours],
            floor=1.0,
            at_least=False,
            raw={"bytes": [one["bytes"] for one in ours]},
        ),
        Figure("the same by BentoML", "(bytes)", [one["bytes"] / one["stored"] for one in theirs]),
        Figure(
            "MiB written to store the same weights under another tag",
            "(MiB)",
            [one["bytes"] / MIB for one in again],
            floor=1.0,
            at_least=False,
            raw={"seconds": [one["seconds"] for one in again]},
        ),
    ]


def _measure(script: str, source: Path, folder: str) -> list[dict[str, float]]:
    home = Path(folder) / "home"
    environment = {**os.environ, "BENTOML_HOME": str(home), "TMPDIR": folder}
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, str(source)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        shutil.rmtree(home, ignore_errors=True)
    measured: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return measured
