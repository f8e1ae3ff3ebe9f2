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

TESTS = Path(__file__).parent
LEVELS = ("unit", "docs", "integration", "attacks", "e2e")
RAY = "ray"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(_level(item))
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    # Ray's take longest and mostly wait, so they are begun first; a plain mistake shows early.
    items.sort(key=lambda item: (_group(item) != RAY, LEVELS.index(_level(item))))


def _level(item: pytest.Item) -> str:
    return item.path.relative_to(TESTS).parts[0]


def _group(item: pytest.Item) -> str:
    """What one process runs in one go, because it shares what is slow to start."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    document = getattr(parameters.get("block"), "document", item.path)  # of a documented block
    if document.name == "scaling.md" or TESTS / "e2e" / "ray" in document.parents:
        return RAY  # one cluster at a time
    return str(document)


@pytest.fixture
def bentoml_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty BentoML store, for this process and for those it starts."""
    home = tmp_path / "bentoml"
    monkeypatch.setenv("BENTOML_HOME", str(home))
    look_again()
    yield home
    look_again()
