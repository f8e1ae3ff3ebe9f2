"""Every architecture that mlx-lm and transformers both have: saved by transformers, and compared.

Each computes what torch computes (logits of 200 tokens, greedy tokens), or is refused. The table in
docs/models.md says which; `make sweep` runs all and writes it, `make test` a few.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from sweep_cases import CASES, DEFAULTS, LEFT_OUT, REFUSED, Case
from sweep_measures import (
    measure,
    other_rows,
    render,
    table_of_page,
    write_page,
)
from sweep_references import Reference, compare, make_references

from mlops.checkpoints import recognise
from mlops.engine.loading import load_model
from mlops.engine.servable import check_loads
from mlops.errors import PackagingError
from torch_process import PYTHON

SAMPLE = (
    *(f"{name}-default" for name in ("llama", "qwen3_moe", "gemma3_text", "stablelm", "gpt_neox")),
    *("deepseek_v3-in_groups", "gpt_oss-default", "qwen3_vl_moe-default", "ernie4_5_moe-default"),
    *("qwen3_moe-yarn", "glm-partial", "phi3-longrope", "laguna-by_layer", "granitemoehybrid-yarn"),
)
needs_torch = pytest.mark.skipif(
    not PYTHON.exists(), reason="torch and transformers are not in .tools/reference: make reference"
)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Reference]:
    cases = [case for case in CASES if str(case) in SAMPLE]
    return make_references(cases, tmp_path_factory.mktemp("sample"))


@needs_torch
@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_computes_what_torch_computes(sample: dict[Case, Reference], name: str) -> None:
    check(next(reference for case, reference in sample.items() if str(case) == name))


@needs_torch
def test_the_context_ends_before_longrope_has_other_factors(
    sample: dict[Case, Reference],
) -> None:
    folder = next(ref.folder for case, ref in sample.items() if str(case) == "phi3-longrope")
    assert load_model(folder).context_tokens == 256


@needs_torch
def test_the_page_is_right_about_the_sample(sample: dict[Case, Reference], tmp_path: Path) -> None:
    for case, reference in sample.items():
        if case.name == "default":
            row = measure(case.architecture, [reference], tmp_path)
            assert str(row) in table_of_page().splitlines()


def test_the_page_has_every_architecture() -> None:
    named = [line.split("|")[1].strip(" `") for line in table_of_page().splitlines()[2:]]
    assert named == sorted({*DEFAULTS, *REFUSED, *LEFT_OUT})


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Reference]:
    refused = [Case(architecture, "default") for architecture in REFUSED]
    return make_references([*CASES, *refused], tmp_path_factory.mktemp("sweep"))


@needs_torch
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_everything_computes_what_torch_computes(
    everything: dict[Case, Reference], subtests: pytest.Subtests
) -> None:
    for case, reference in everything.items():
        if case.architecture not in REFUSED:
            with subtests.test(str(case)):
                check(reference)


@needs_torch
@pytest.mark.long
def test_what_is_said_to_be_refused_is(
    everything: dict[Case, Reference], subtests: pytest.Subtests
) -> None:
    for case, reference in everything.items():
        if case.architecture in REFUSED:
            reason = re.escape(REFUSED[case.architecture])
            with subtests.test(str(case)), pytest.raises(PackagingError, match=reason):
                check_loads(recognise(reference.folder))


@needs_torch
@pytest.mark.long
def test_a_setting_of_the_rotary_embedding_changes_what_torch_computes(
    everything: dict[Case, Reference],
) -> None:
    """Else nothing would be shown by equal results."""
    defaults = {
        case.architecture: reference.logits
        for case, reference in everything.items()
        if case.name == "default"
    }
    for case, reference in everything.items():
        is_default = case.architecture in REFUSED or case.name in ("default", "dynamic")
        if not is_default:  # dynamic changes nothing in this length
            assert np.abs(reference.logits - defaults[case.architecture]).max() > 1e-3, case


@needs_torch
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_page_shows_what_is_measured(everything: dict[Case, Reference], tmp_path: Path) -> None:
    by_architecture: dict[str, list[Reference]] = defaultdict(list)
    for case, reference in everything.items():
        if case.architecture not in REFUSED:
            by_architecture[case.architecture].append(reference)
    rows = [measure(name, group, tmp_path) for name, group in by_architecture.items()]
    rows += other_rows()
    if os.environ.get("SWEEP_PAGE") == "write":
        write_page(rows)
    assert table_of_page() == render(rows)


def check(reference: Reference) -> None:
    assert not reference.error
    comparison = compare(load_model(reference.folder), reference)
    assert comparison.agrees, comparison
