"""What a program that knows nothing of this toolkit needs to get the optimized BLAS."""

from __future__ import annotations

import os
import warnings

from mlops.hardware.blas import BlasWarning, find_blas, thread_environment
from mlops.hardware.machine import detect


def launch_environment() -> dict[str, str]:
    """The environment variables that `mlops run -- COMMAND` adds for COMMAND and its children.

    On a Linux CPU that is `LD_PRELOAD`, with what the user preloads kept behind it, and the number
    of BLAS threads. Elsewhere it is empty. Warns with a `BlasWarning` when no optimized BLAS can be
    had, or when its path cannot be preloaded.
    """
    if detect().system != "Linux":
        return {}
    status = find_blas()
    if status.path is None:
        if status.problem:
            warnings.warn(f"{status.problem} {status.fix}", BlasWarning, stacklevel=2)
        return {}
    if " " in status.path or ":" in status.path:
        warnings.warn(
            f"{status.path} cannot be preloaded, because its path has a space or a colon. "
            "Set XDG_CACHE_HOME to a folder without them.",
            BlasWarning,
            stacklevel=2,
        )
        return {}
    preloads = filter(None, [status.path, os.environ.get("LD_PRELOAD")])
    return {"LD_PRELOAD": ":".join(preloads), **thread_environment()}
