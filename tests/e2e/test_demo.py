"""The demo as a new user runs it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, Run

from mlops.demo.service import free_port

MLOPS = Path(sys.executable).with_name("mlops")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "a folder with blanks"
    folder.mkdir()
    return folder


def users_path() -> str:
    """A PATH on which none of our own commands is."""
    places = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(place for place in places if not Path(place, "mlops").exists())


def run_demo(folder: Path) -> str:
    """As `make demo` runs it: its PATH is not that of the user's shell."""
    done = subprocess.run(
        [MLOPS, "demo", "--folder", folder / ".demo"],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={
            **os.environ,
            "COLUMNS": "200",
            "PATH": f"{MLOPS.parent}{os.pathsep}{os.environ['PATH']}",
            "CALLER_PATH": users_path(),
        },
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


@pytest.fixture(scope="module")
def output(folder: Path) -> str:
    """What the first demo in the folder prints."""
    return run_demo(folder)


def test_demo_shows_two_adapters_that_answer_otherwise(output: str) -> None:
    said = answers(output)
    assert set(said) == {"base", "json", "capitals"}
    assert said["json"].startswith("{"), said
    assert len(json.loads(said["json"])) >= 1
    letters = [letter for letter in said["capitals"] if letter.isalpha()]
    assert len(letters) > 10
    assert sum(letter.isupper() for letter in letters) > 0.8 * len(letters), said
    assert not said["base"].startswith("{")
    assert not said["base"].isupper()


def test_printed_commands_work_as_pasted(output: str, folder: Path) -> None:
    """Each in a shell of its own, after the printed `export` lines; only ports are replaced."""
    commands = [line.strip() for line in output.partition("Go on with:\n")[2].splitlines()[:-1]]
    exports = [command for command in commands if command.startswith("export ")]
    assert exports[0].startswith("export PATH=")
    service, page = free_port(), free_port()
    ports = {
        "mlops serve": f" --port {service}",
        "mlops predict": f" --url http://127.0.0.1:{service}",
        "mlops chat": f" --url http://127.0.0.1:{service}",
        "mlflow ui": f" --port {page}",
    }
    ready = {
        "mlops serve": f"http://127.0.0.1:{service}/readyz",
        "mlflow ui": f"http://127.0.0.1:{page}/",
    }
    said = {}
    with contextlib.ExitStack() as servers:
        for name in ready:
            [command] = [command for command in commands if command.startswith(name)]
            servers.enter_context(running([*exports, command + ports[name]], folder))
        for name, url in ready.items():
            said[name] = fetch(url)
        for command in commands:
            name = " ".join(command.split()[:2])
            if name not in ready and command not in exports:
                pasted = command.replace(":3000", f":{service}") + ports.get(name, "")
                done = in_shell([*exports, pasted], folder)
                assert done.returncode == 0, (command, done.stderr)
                said[name] = done.stdout
    assert set(said) == {
        "mlops models", "mlops serve", "mlops predict", "mlops chat", "mlflow ui",
        "curl localhost:3000/metrics",
    }  # fmt: skip
    assert "(lora-json), experiment demo" in said["mlops models"]
    assert said["mlops predict"].startswith("{")
    assert len(said["mlops chat"]) > 10
    assert "<title>MLflow</title>" in said["mlflow ui"]
    assert '"adapters"' in said["curl localhost:3000/metrics"]


def shell(lines: list[str]) -> list[str]:
    return ["bash", "--noprofile", "--norc", "-c", "\n".join(lines)]


def fresh_environment() -> dict[str, str]:
    kept = ("HOME", "LANG", "TMPDIR", "XDG_CACHE_HOME")
    environment = {key: os.environ[key] for key in kept if key in os.environ}
    return {**environment, "PATH": users_path(), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def in_shell(lines: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        shell(lines),
        input="What is a list?\n",  # to whoever reads it
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=fresh_environment(),
    )


@contextlib.contextmanager
def running(lines: list[str], folder: Path) -> Iterator[None]:
    """A server until the block ends; what it said is printed when that raises."""
    log = folder / "pasted.log"
    with log.open("a") as out:
        server = subprocess.Popen(
            shell(lines),
            stdout=out,
            stderr=out,
            cwd=folder,
            env=fresh_environment(),
            start_new_session=True,
        )
    try:
        yield
    except BaseException:
        print(log.read_text())
        raise
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def fetch(url: str) -> str:
    """What a server answers, once it does."""
    end = time.monotonic() + 240
    while True:
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return str(answer.read().decode())
        except OSError:
            assert time.monotonic() < end, url
            time.sleep(0.2)


def tracked(folder: Path) -> tuple[dict[str, Run], dict[str, LoggedModel]]:
    """Runs and logged models of the demo's experiment, by name; each name is there once."""
    client = MlflowClient(f"sqlite:///{folder / '.demo' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("demo")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    models = client.search_logged_models([experiment.experiment_id])
    by_name = {run.info.run_name: client.get_run(run.info.run_id) for run in found}
    assert (len(by_name), len(models)) == (len(found), 3)
    return by_name, {model.name: model for model in models}


def test_demo_tracked_the_training_and_the_package(output: str, folder: Path) -> None:
    runs, models = tracked(folder)
    assert set(runs) == {"lora-json", "lora-capitals", "package"}
    training, package = runs["lora-json"], runs["package"]
    assert training.data.metrics["train_loss"] < 3
    assert training.data.params["base_model"] == package.data.tags["model_tag"]
    assert training.data.params["base_model_digest"] == package.data.tags["model_digest"]
    [lessons] = training.inputs.dataset_inputs
    assert lessons.dataset.name == "lessons-json"
    assert Path(json.loads(lessons.dataset.source)["uri"]).stat().st_size > 10_000

    assert package.data.tags["bento_tag"].startswith("demo:")
    assert package.data.tags["adapter.json"].startswith("demo-base-json:")
    assert package.data.tags["adapter.json.run_id"] == training.info.run_id
    bento = package.data.tags["bento_tag"].replace(":", ".")
    assert training.data.tags[f"package.{bento}"] == package.info.run_id
    assert models["json"].source_run_id == training.info.run_id
    assert package.data.tags["adapter.json"].startswith(models["json"].tags["model_tag"])


def test_second_run_finds_everything_and_tracks_nothing_new(output: str, folder: Path) -> None:
    def content() -> list[object]:
        runs, models = tracked(folder)
        return [
            *((run.info.run_id, run.data.tags, run.data.params) for run in runs.values()),
            *((model.model_id, model.tags) for model in models.values()),
        ]

    before = content()
    assert run_demo(folder).count("trained before") == 2
    assert content() == before
