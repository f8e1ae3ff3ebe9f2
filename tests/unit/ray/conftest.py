"""Ray Serve is imported here once: a module of its own warns when that is done."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings(
        "ignore", "Using extra keyword arguments on `Field`", DeprecationWarning
    )
    import ray.serve  # noqa: F401
