"""Processes that begin at the same moment."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence


def race(
    script: str, arguments: Sequence[Sequence[str]], env: Mapping[str, str] | None = None
) -> list[str]:
    """Run a script once for each list of arguments; returns what each printed after its start.

    Args:
        script: prints `ready` when it is, and waits for a line.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, *given],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for given in arguments
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.communicate(timeout=120)[0] for process in processes]
