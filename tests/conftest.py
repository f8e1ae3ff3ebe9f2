"""What every test has: a marker from its folder, and a BentoML store of its own when it asks."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from bentoml_store import look_again
from mlops.hardware import ensure_blas

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# One token for all Ray clusters of these tests, whatever this user has; before Ray is imported.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
# A busy machine is no reason to fail: `timeout` in pyproject.toml ends what hangs.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
# The tests run in several processes, and start more: one that has all cores keeps others waiting.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
ensure_blas()  # before any test imports MLX

LEVELS = ("unit", "docs", "integration", "sweep", "attacks", "e2e")
RAY = "ray"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(_level(item.nodeid))
    # Ray's take longest and mostly wait, so they are begun first; a plain mistake shows early.
    items.sort(key=lambda item: (_group(item.nodeid) != RAY, LEVELS.index(_level(item.nodeid))))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return Groups(config, log)


class Groups(LoadScopeScheduling):
    """Gives a process all tests at once that share what is slow to start."""

    def _split_scope(self, nodeid: str) -> str:
        return _group(nodeid)


def _level(nodeid: str) -> str:
    return nodeid.split("/")[1]


def _group(nodeid: str) -> str:
    """A file's tests, or those of one document; those of Ray are one, for they share a cluster."""
    file, _, test = nodeid.partition("::")
    document = test.partition("test_block[")[2].partition(":")[0]
    if file.startswith("tests/e2e/ray/") or document == "docs/scaling.md":
        return RAY
    return document or file


@pytest.fixture
def bentoml_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty BentoML store, for this process and for those it starts."""
    home = tmp_path / "bentoml"
    monkeypatch.setenv("BENTOML_HOME", str(home))
    look_again()
    yield home
    look_again()
