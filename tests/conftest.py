"""What every test has: a marker from its folder, and a BentoML store of its own when it asks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from mlops.hardware import ensure_blas

ensure_blas()  # before any test imports MLX
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A busy machine is no reason to fail: `timeout` in pyproject.toml ends what hangs.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

TESTS = Path(__file__).parent
STORE_PROVIDERS = (
    "bentoml_home",
    "tmp_bento_store_dir",
    "bento_store_dir",
    "model_store_dir",
    "env_store_dir",
    "bento_store",
    "tmp_bento_store",
    "model_store",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        level = Path(item.path).relative_to(TESTS).parts[0]
        if level in {"unit", "integration", "e2e", "docs"}:
            item.add_marker(level)


@pytest.fixture
def bentoml_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty BentoML store, for this process and for those it starts."""
    from bentoml._internal.configuration.containers import BentoMLContainer
    from simple_di import sentinel

    home = tmp_path / "bentoml"
    monkeypatch.setenv("BENTOML_HOME", str(home))
    # BentoML looks at BENTOML_HOME once a process: let it look again, now and afterwards.
    for name in STORE_PROVIDERS:
        provider = getattr(BentoMLContainer, name)
        provider.reset()
        monkeypatch.setattr(provider, "_cache", sentinel)
    return home
