"""The demo: fine-tune two adapters, track, package, serve, ask, and say what happened.

    base model -> two LoRA adapters (mlx-lm's trainer, tracked in MLflow)
    -> store entries and one Bento -> `bentoml serve` -> questions over HTTP, all at once -> summary

Everything lies in one folder, `.demo` by default. A second run finds the trained adapters there.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from mlops.demo import service
from mlops.demo.lessons import LESSONS
from mlops.demo.training import Recipe, train_adapter
from mlops.errors import ServiceError
from mlops.installation import callers_path, install_command

if TYPE_CHECKING:
    from mlops.client import TrackingClient
    from mlops.registry import StoredModel

PROJECT = "demo"
QUESTIONS = ("Explain the for statement.", "What does the open function do?")


def run_demo(model: str | None, folder: Path, keep_serving: bool, on_ray: bool = False) -> None:
    """Run the demo.

    Args:
        model: folder or hub id of a base model; by default the toolkit's own.
        folder: where everything is written.
        keep_serving: leave the service running until Ctrl-C.
        on_ray: serve on a Ray cluster of two nodes, and show what that brings.

    Raises:
        MLOpsError: a step failed; says which and why.
    """
    start = time.perf_counter()
    # In a pipe a sentence stays a line; tables and rules keep a usual width.
    console = Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
    folder = folder.resolve()
    home = folder / "bentoml"
    home.mkdir(parents=True, exist_ok=True)
    os.environ["BENTOML_HOME"] = str(home)
    tracking_uri = f"sqlite:///{folder / 'mlflow.db'}"
    package = _make_bento(model, folder, tracking_uri, console)
    if on_ray:
        from mlops.demo.cluster import show_cluster

        show_cluster(package["bento_tag"], folder, console, keep_serving)
    else:
        _serve_and_ask(package, folder, tracking_uri, console, keep_serving)
    console.print(f"done in {time.perf_counter() - start:.0f} s", style="green")


def _make_bento(
    model: str | None, folder: Path, tracking_uri: str, console: Console
) -> dict[str, Any]:
    """Train, track and package; returns what packaging returned."""
    base = model or str(files("mlops.demo") / "base_model")

    from mlops.client import create_client
    from mlops.registry import ModelStore
    from mlops.serving.bentoml.packager import package_model

    with create_client(PROJECT, tracking_uri=tracking_uri) as client:
        console.rule("1. The base model", align="left")
        stored = package_model(base, "demo-base", PROJECT, build_bento=False)
        console.print(f"{stored['description']}\nstored as {stored['model_tag']}")

        console.rule("2. Two LoRA adapters", align="left")
        adapters = _train(ModelStore().get(stored["model_tag"]), folder, client)

        console.rule("3. Package: base and adapters in one Bento", align="left")
        result = package_model(base, "demo-base", PROJECT, service_name="demo", adapters=adapters)
        _link(result, client)
        for name, tag in {"base": result["model_tag"], **result["adapter_tags"]}.items():
            console.print(f"{name:<10} {tag}")
        console.print(f"{'bento':<10} {result['bento_tag']}")
    return result


def _serve_and_ask(
    package: Mapping[str, Any],
    folder: Path,
    tracking_uri: str,
    console: Console,
    keep_serving: bool,
) -> None:
    bento_tag = str(package["bento_tag"])
    console.rule("4. Serve and ask over HTTP", align="left")
    port = service.free_port(3000 if keep_serving else 0)
    home = folder / "bentoml"
    with (
        console.status(f"bentoml serve {bento_tag} …") as status,
        service.served(bento_tag, home, folder / "serve.log", port) as url,
    ):
        status.update("asking all at once …")
        answers = ask_everything(url)
        status.stop()
        console.print(answers)
        _say_how_they_ran(console, service.metrics(url)["engine"]["steps"])
        _say_how_to_go_on(console, folder, tracking_uri, package)
        if keep_serving:
            wait_for_interrupt(console, url)


def _link(result: Mapping[str, Any], client: TrackingClient) -> None:
    """Give the package a run, unless an earlier demo did so for the same content."""
    if client.runs_of(result["bento_tag"]):
        client.link_package(result)
    else:
        with client.start_run(run_name="package"):
            client.link_package(result)


def _train(base: StoredModel, folder: Path, client: TrackingClient) -> dict[str, str | Path]:
    """Adapter folders by name; those that an earlier run trained on the same base are kept."""
    recipe = Recipe()
    adapters: dict[str, str | Path] = {}
    with Progress(
        TextColumn("{task.description:<30}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    ) as progress:
        for lesson in LESSONS:
            key = hashlib.sha256(
                f"{base.digest} {sorted(asdict(recipe).items())}".encode()
            ).hexdigest()
            trained = folder / "adapters" / f"{lesson.name}-{key[:12]}"
            task = progress.add_task(
                f"{lesson.name}: {lesson.style}", total=recipe.iterations, state="starting"
            )

            def report(iteration: int, loss: float, task: Any = task) -> None:
                progress.update(task, completed=iteration, state=f"loss {loss:.2f}")

            if trained.exists() and client.source_run(trained):
                progress.update(task, completed=recipe.iterations, state="trained before")
            else:
                data = folder / "data" / f"{lesson.name}.jsonl"
                train_adapter(
                    base, lesson, recipe, trained, data=data, client=client, report=report
                )
            adapters[lesson.name] = trained
    return adapters


def ask_everything(url: str) -> Table:
    """The same questions to the base and to each adapter, all at the same time."""
    names = ("base", *(lesson.name for lesson in LESSONS))
    asked = list(itertools.product(QUESTIONS, names))

    def ask(question: str, name: str) -> str:
        answer = service.ask(url, text=question, adapter=name, max_tokens=80, temperature=0)
        return str(answer["prediction"]).strip()

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: ask(*one), asked))
    table = Table(show_lines=True)
    table.add_column("question")
    table.add_column("asked")
    table.add_column("answer", overflow="fold")
    for (question, name), answer in zip(asked, answers, strict=True):
        # Text, so that brackets in an answer are not taken for markup.
        table.add_row(question if name == "base" else "", name, Text(answer))
    return table


def _say_how_they_ran(console: Console, steps: Mapping[str, Any]) -> None:
    """Show from the engine's own counters that they shared their steps.

    Raises:
        ServiceError: they did not.
    """
    most = max(map(int, steps["by_adapters"]), default=0)
    if most <= len(LESSONS):
        raise ServiceError(
            f"no step computed the base and {len(LESSONS)} adapters together: {steps}", "demo"
        )
    console.print(
        f"{len(QUESTIONS) * most} requests in one batch: of {steps['decode']} steps, "
        f"{steps['mixed']} computed several adapters at once, {steps['by_adapters'][str(most)]} of "
        f"them the base and all {most - 1} adapters. Rows in a step, and how many steps:"
    )
    table = Table("rows", "steps", "", box=None, padding=(0, 1))
    for rows, number in steps["by_rows"].items():
        table.add_row(rows, str(number), "█" * max(1, round(40 * number / steps["decode"])))
    console.print(table)


def _say_how_to_go_on(
    console: Console, folder: Path, tracking_uri: str, package: Mapping[str, Any]
) -> None:
    console.print(
        "\nOne base model in memory answered as itself and through two small adapters, all in one "
        "batch. Every byte was checked against its SHA-256 before it was served.\n"
    )
    console.print("Go on with:")
    for command in (
        *paths_to_set(),
        f"export BENTOML_HOME={quote(str(folder / 'bentoml'))}",
        "mlops models list",
        f"mlops models show {package['adapter_tags'][LESSONS[0].name]}",
        f"mlops serve {package['bento_tag']}",
        'mlops predict "What is a list?" --adapter json',
        "mlops chat --adapter capitals",
        "curl localhost:3000/metrics",
        *([] if _is_installed("mlflow") else [install_command("mlflow", "mlflow")]),
        f"mlflow ui --backend-store-uri {quote(tracking_uri)}",
    ):
        console.print(f"  {command}", soft_wrap=True)


def paths_to_set() -> list[str]:
    """The line that the user's shell needs to find our commands, if it does not."""
    ours = Path(sys.executable).parent
    for name in ("mlops", "mlflow"):
        found = shutil.which(name, path=callers_path())
        if found is None or Path(found).resolve().parent != ours.resolve():
            return [f'export PATH={quote(str(ours))}:"$PATH"']
    return []


def _is_installed(distribution: str) -> bool:
    try:
        return bool(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return False


def wait_for_interrupt(console: Console, url: str) -> None:
    console.print(
        f"\nserving at {url} until Ctrl-C; for instance:\n"
        f"  curl {url}/predict -H 'Content-Type: application/json' "
        """-d '{"text": "What is a list?", "adapter": "json", "temperature": 0}'""",
        soft_wrap=True,
    )
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
