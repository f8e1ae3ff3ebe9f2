"""Settings other than the default: computed as torch does, held to a window, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from settings_cases import CAPPED, COMPUTED, EARLIER, REFUSED, SAMPLE
from sweep_cases import Case
from sweep_references import PROMPT, TOLERANCE, Reference, compare, make_references

from mlops.checkpoints import recognise
from mlops.engine.loading import load_model
from mlops.engine.owner import run_in_owner
from mlops.errors import PackagingError
from torch_process import PYTHON

CASES = (*COMPUTED, *CAPPED, *REFUSED)
pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="torch and transformers are not in .tools/reference: make reference"
)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Reference]:
    cases = [case for case in CASES if str(case) in SAMPLE]
    return make_references([*cases, *EARLIER], tmp_path_factory.mktemp("sample"))


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_settings(sample: dict[Case, Reference], name: str) -> None:
    case = next(case for case in sample if str(case) == name)
    check(case, sample[case])


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_all_settings(tmp_path_factory: pytest.TempPathFactory, subtests: pytest.Subtests) -> None:
    references = make_references(CASES, tmp_path_factory.mktemp("settings"))
    for case, reference in references.items():
        with subtests.test(str(case)):
            check(case, reference)


def test_settings_as_earlier_versions_wrote_them(sample: dict[Case, Reference]) -> None:
    for case, reference in ((case, sample[case]) for case in EARLIER):
        path = reference.folder / "config.json"
        config = EARLIER[case](json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(config), encoding="utf-8")
        comparison = compare(load_model(reference.folder), reference)
        assert comparison.agrees, f"{case}: {comparison}"


def check(case: Case, reference: Reference) -> None:
    assert not reference.error
    if case in REFUSED:
        with pytest.raises(PackagingError, match=REFUSED[case]):
            recognise(reference.folder)
        return
    loaded = load_model(reference.folder)
    if case in COMPUTED:
        comparison = compare(loaded, reference)
        assert comparison.agrees, comparison
        return
    window = loaded.context_tokens
    assert window == 32
    spread = reference.logits.max() - reference.logits.min()
    errors = np.abs(run_in_owner(_logits, loaded.model) - reference.logits).max(axis=-1) / spread
    assert errors[:window].max() <= TOLERANCE
    assert errors[window:].max() > TOLERANCE  # else it would be no reason to hold it to that
    assert any("sliding_window is 32" in warning for warning in loaded.checkpoint.warnings)


def _logits(model: Any) -> Any:
    import mlx.core as mx

    return np.array(model(mx.array([PROMPT]))[0].astype(mx.float32))
