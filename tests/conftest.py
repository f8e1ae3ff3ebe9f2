"""What every test has: a marker from its folder, and a BentoML store of its own when it asks."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from bentoml_store import look_again
from mlops.hardware import ensure_blas

ensure_blas()  # before any test imports MLX
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# One token for all Ray clusters of these tests, whatever this user has; before Ray is imported.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
# A busy machine is no reason to fail: `timeout` in pyproject.toml ends what hangs.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        level = Path(item.path).relative_to(TESTS).parts[0]
        if level in {"unit", "integration", "e2e", "docs", "attacks"}:
            item.add_marker(level)


@pytest.fixture
def bentoml_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty BentoML store, for this process and for those it starts."""
    home = tmp_path / "bentoml"
    monkeypatch.setenv("BENTOML_HOME", str(home))
    look_again()
    yield home
    look_again()
