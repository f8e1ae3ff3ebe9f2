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
    """Measure both sides in turn, with the weights in one file and in four."""
    with tempfile.TemporaryDirectory(prefix="mlops-bench-") as folder:
        whole, shards = Path(folder) / "whole", Path(folder) / "shards"
        _write_model(whole, num_files=1)
        _write_model(shards, num_files=4)
        _measure(OURS, whole, folder)  # not counted: fills caches that later runs would find full
        ours, sharded, theirs, theirs_sharded = [], [], [], []
        for _ in range(runs):
            ours.append(_measure(OURS, whole, folder))
            theirs.append(_measure(BENTOML, whole, folder)[0])
            sharded.append(_measure(OURS, shards, folder)[0])
            theirs_sharded.append(_measure(BENTOML, shards, folder)[0])
    first = [one[0] for one in ours]
    again = [one[1] for one in ours]
    return [
        _times_faster("store 1 GiB in one file: times faster", first, theirs),
        _times_faster("store 1 GiB in four files: times faster", sharded, theirs_sharded),
        Figure(
            "bytes written per stored byte",
            "(bytes)",
            [one["bytes"] / one["stored"] for one in first],
            floor=1.0,
            at_least=False,
            raw={"bytes": [one["bytes"] for one in first]},
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


def _times_faster(
    name: str, ours: list[dict[str, float]], theirs: list[dict[str, float]]
) -> Figure:
    return Figure(
        name,
        "bentoml.models.create and a copy",
        [b["seconds"] / a["seconds"] for a, b in zip(ours, theirs, strict=True)],
        floor=2.5,
        raw={
            "seconds": [one["seconds"] for one in ours],
            "bentoml_seconds": [one["seconds"] for one in theirs],
        },
    )


def _write_model(folder: Path, num_files: int) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for number in range(num_files):
        with (folder / f"model-{number}.safetensors").open("wb") as file:
            for _ in range(MODEL_BYTES // num_files // (64 * MIB)):
                file.write(os.urandom(64 * MIB))


def _measure(script: str, source: Path, folder: str) -> list[dict[str, float]]:
    os.sync()  # what earlier runs left to be written would be paid for by this one
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
