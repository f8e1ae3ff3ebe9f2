"""The demo as a new user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


def run_demo(folder: Path) -> str:
    done = subprocess.run(
        [Path(sys.executable).with_name("mlops"), "demo", "--folder", folder / ".demo"],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def answers(output: str) -> dict[str, str]:
    """The answers to the first question by who was asked, from the table that the demo prints."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines()]
    first = [row for row in rows if len(row) == 3][:9]
    found: dict[str, str] = {}
    for _, name, answer in first:
        if name:
            found.setdefault(name, answer)
        elif found:
            found[list(found)[-1]] += " " + answer
    return found


def test_demo_shows_two_adapters_that_answer_otherwise(folder: Path) -> None:
    output = run_demo(folder)
    said = answers(output)
    assert set(said) == {"base", "json", "capitals"}
    assert said["json"].startswith("{"), said
    assert len(json.loads(said["json"])) >= 1
    letters = [letter for letter in said["capitals"] if letter.isalpha()]
    assert len(letters) > 10
    assert sum(letter.isupper() for letter in letters) > 0.8 * len(letters), said
    assert not said["base"].startswith("{")
    assert not said["base"].isupper()
    for command in ("mlops models list", "mlops serve demo:", "mlflow ui"):
        assert command in output


def test_demo_tracked_the_training_and_the_package(folder: Path) -> None:
    client = MlflowClient(f"sqlite:///{folder / '.demo' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("demo")
    assert experiment is not None
    runs = {run.info.run_name: run.data for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"lora-json", "lora-capitals", "package"}
    assert runs["lora-json"].metrics["train_loss"] < 3
    assert runs["package"].tags["bento_tag"].startswith("demo:")


def test_second_run_finds_everything(folder: Path) -> None:
    output = run_demo(folder)
    assert output.count("trained before") == 2
