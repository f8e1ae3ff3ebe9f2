"""An optimized BLAS, placed before anything here imports MLX."""

from __future__ import annotations

import pytest

from mlops.hardware import ensure_blas


@pytest.fixture(scope="session", autouse=True)
def blas() -> None:
    ensure_blas()
