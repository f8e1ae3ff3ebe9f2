"""Each thing that is wrong is named, with what to do about it; a good machine has no problem."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recorded_machines import MACHINES, probes_of

from mlops.hardware import diagnose


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.mark.parametrize("name", ["M1", "M1 Pro", "M3 Ultra", "M4 Pro", "macOS VM", "Linux CUDA"])
def test_a_good_machine_has_no_problem(name: str, store: Path) -> None:
    diagnosis = diagnose(probes_of(name))

    assert diagnosis.problems == []
    assert diagnosis.store == str(store)
    assert diagnosis.versions["mlx-lm"] == "0.32.2"
    assert diagnosis.versions["ray"] is None
    assert not store.exists()


@pytest.mark.parametrize(
    ("name", "changes", "what", "fix"),
    [
        ("Rosetta", {}, "Rosetta", "arm64 Python"),
        ("Intel Mac", {}, "Intel", "Apple silicon"),
        ("M2 Max", {}, "hot", "cool"),
        ("M1", {"mac_version": "13.6"}, "macOS 13.6 is too old", "macOS 14"),
        ("M1", {"free_disk_bytes": 1 << 20}, "GiB of disk", "BENTOML_HOME"),
    ],
)
def test_a_problem_is_named_with_its_fix(
    name: str, changes: dict[str, object], what: str, fix: str
) -> None:
    problems = diagnose(probes_of(name, **changes)).problems

    assert any(what in problem.what and fix in problem.fix for problem in problems), problems


@pytest.mark.parametrize(
    ("library", "version", "what"),
    [
        ("bentoml", "1.4.9", "BentoML 1.4.9 has known security holes"),
        ("bentoml", None, "bentoml is not installed"),
        ("mlx", None, "mlx is not installed"),
        ("mlx-metal", None, "MLX is installed without a backend"),
    ],
)
def test_a_missing_or_old_library_is_a_problem(
    library: str, version: str | None, what: str
) -> None:
    versions = {**MACHINES["M1"]["answers"]["versions"], library: version}
    problems = diagnose(probes_of("M1", versions=versions)).problems

    assert [problem.what[: len(what)] for problem in problems] == [what]
    assert "pip install" in problems[0].fix


def test_a_machine_with_little_memory_is_told_so() -> None:
    sysctl = {**MACHINES["M1"]["answers"]["sysctl"], "hw.memsize": str(2 << 30)}
    problems = diagnose(probes_of("M1", sysctl=sysctl)).problems

    assert ["2.0 GiB of memory" in problem.what for problem in problems] == [True]


def test_a_store_that_cannot_be_written_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "file" / "store"))

    problems = diagnose(probes_of("M1")).problems

    assert ["cannot be written" in problem.what for problem in problems] == [True]
    assert "BENTOML_HOME" in problems[0].fix


def test_a_diagnosis_is_json() -> None:
    facts = json.loads(json.dumps(diagnose(probes_of("Rosetta")).to_dict()))

    assert facts["hardware"]["is_rosetta"] is True
    assert facts["problems"][0]["fix"]
