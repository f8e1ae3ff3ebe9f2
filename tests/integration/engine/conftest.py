"""One tiny Llama for the tests of a module."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny_models
from mlops import engine
from mlops.engine import LoadedModel


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder."""
    return tiny_models.write_language_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def loaded(base: Path) -> LoadedModel:
    """The same, in memory."""
    return engine.load_model(base)
