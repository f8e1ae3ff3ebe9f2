"""Every architecture that mlx-lm and transformers both have: saved by transformers, and compared.

Each computes what torch computes (logits of 200 tokens, greedy tokens), or is refused by name when
it is packaged.
"""

from __future__ import annotations

import pytest
from sweep_cases import CASES, Case
from sweep_references import PYTHON, Reference, compare, make_references

from mlops.engine.loading import load_model

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="torch and transformers are not in .tools/reference: make reference"
)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Reference]:
    return make_references(CASES, tmp_path_factory.mktemp("sweep"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_and_tokens_are_those_of_torch(
    references: dict[Case, Reference], case: Case
) -> None:
    reference = references[case]
    assert not reference.error
    comparison = compare(load_model(reference.folder), reference)
    assert comparison.agrees, comparison
