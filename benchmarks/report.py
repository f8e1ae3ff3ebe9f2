"""What every benchmark gives back: ratios against a named peer, measured in the same run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass
class Figure:
    """One line of the table.

    Attributes:
        name: what was measured.
        peer: what it is held against, or the unit when there is no peer.
        samples: one value a run.
        floor: what the value must reach (`at_least`) or must not pass.
        aim: what it is hoped to reach; no verdict hangs on it.
        raw: the measurements behind the samples, for the JSON.
    """

    name: str
    peer: str
    samples: list[float]
    floor: float | None = None
    at_least: bool = True
    raw: dict[str, list[float]] = field(default_factory=dict)
    aim: float | None = None

    @property
    def median(self) -> float:
        """The value to quote."""
        return statistics.median(self.samples)

    @property
    def verdict(self) -> str:
        """`ok` or `MISSED` against the floor, or nothing where there is none."""
        if self.floor is None:
            return ""
        reached = self.median >= self.floor if self.at_least else self.median <= self.floor
        return "ok" if reached else "MISSED"

    def row(self) -> str:
        """The figure as a row of a Markdown table."""
        spread = f"{min(self.samples):.3g} to {max(self.samples):.3g}"
        sign = "≥" if self.at_least else "≤"
        floor = "" if self.floor is None else f"{sign} {self.floor:g}"
        if self.aim is not None:
            floor += f" (aim {self.aim:g})"
        return (
            f"| {self.name} | {self.peer} | {self.median:.3g} | {spread} | {floor} "
            f"| {self.verdict} |"
        )


HEADER = "| figure | against | median | spread | floor | |\n|---|---|---|---|---|---|"


def write_json(name: str, figures: list[Figure]) -> Path:
    """Keep the figures with all that is needed to judge them."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    libraries = ("mlx", "mlx-lm", "bentoml", "mlx-mlops", "numpy", "scipy-openblas32")
    libraries += ("ray", "litserve", "fastapi", "uvicorn", "starlette", "llguidance")
    facts = {
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain")),
        "machine": platform.machine(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {library: _version(library) for library in libraries},
        "figures": [
            {**asdict(figure), "median": figure.median, "verdict": figure.verdict}
            for figure in figures
        ],
    }
    path.write_text(json.dumps(facts, indent=1))
    return path


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
