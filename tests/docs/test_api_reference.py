"""docs/api.md is what its generator writes. That its examples work, test_documents.py shows."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest
from documents import REPOSITORY

from mlops.serving.http.operations import OPERATIONS


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    path = REPOSITORY / "tools" / "api_reference.py"
    spec = importlib.util.spec_from_file_location("api_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_generator_writes(generator: ModuleType) -> None:
    written = generator.PAGE.read_text(encoding="utf-8")
    assert written == generator.make_reference(), "run `make docs`"


def test_every_operation_has_its_heading(generator: ModuleType) -> None:
    headings = re.findall(r"^### (GET|POST) (\S+)$", generator.make_reference(), re.MULTILINE)
    assert set(headings) == {(one.method.upper(), one.path) for one in OPERATIONS}


def test_every_field_is_explained(generator: ModuleType) -> None:
    rows = re.findall(r"^\| (`.*) \|$", generator.make_reference(), re.MULTILINE)
    assert len(rows) > 100
    assert [row for row in rows if not row.rpartition(" | ")[2].strip()] == []
