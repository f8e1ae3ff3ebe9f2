"""Scripts for the Python that has torch, PEFT and transformers with models (`.tools/reference`)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

PYTHON = Path(__file__).parents[1] / ".tools" / "reference" / "bin" / "python"


def run_in_torch(script: Path, *arguments: str | Path, timeout_s: float) -> None:
    """Run a script that knows nothing of MLX, or raise `RuntimeError` with what it said last."""
    done = subprocess.run(
        [PYTHON, script, *arguments],
        # One thread: for models as small as these, more only wait for each other.
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-4000:])
