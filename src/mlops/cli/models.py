"""`mlops models`: what is in the model store."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlops.cli import console
from mlops.cli.arguments import examples
from mlops.errors import ConfigError, PackagingError, TrackingError

if TYPE_CHECKING:
    from mlops.client import RunRecord
    from mlops.registry import ModelStore, StoredModel

models = typer.Typer(help="What is in the model store.", no_args_is_help=True)


@models.command("list", epilog=examples("mlops models list --project support"))
def list_models(
    project: Annotated[str | None, typer.Option(help="Only this project's models.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """List every model, with its project, kind, base and size."""
    from rich.table import Table
    from rich.text import Text

    from mlops.registry import ModelStore

    store = ModelStore()
    entries = store.list()
    if project is not None:
        entries = _of_project(entries, project)
    if as_json:
        console.print_json([_as_dict(entry) for entry in entries])
        return
    if not entries:
        console.print_note("no models yet; `mlops package FOLDER` stores one")
        _print_reclaimable(store)
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("tag", no_wrap=True)  # to be copied
    for heading in ("project", "kind", "base"):
        table.add_column(heading, overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    for entry in entries:
        cells = (
            entry.tag,
            entry.labels.get("project", ""),
            entry.manifest.kind,
            entry.manifest.base_tag or "",
            f"{entry.manifest.size / 2**20:.1f} MB",
        )
        table.add_row(*map(Text, cells))  # not markup: a label may hold brackets
    console.output().print(table)
    _print_reclaimable(store)


def _print_reclaimable(store: ModelStore) -> None:
    try:
        num_bytes = store.collect_garbage(dry_run=True).num_bytes
    except PackagingError:  # another command writes, or this user may not
        return
    if num_bytes:
        console.print_note(f"{num_bytes / 2**20:.1f} MB reclaimable: `mlops gc` frees them")


@models.command("show", epilog=examples("mlops models show helpdesk:1.0.0 --verify"))
def show_model(
    tag: Annotated[
        str,
        typer.Argument(metavar="NAME[:VERSION]", help="The newest where no version is given."),
    ],
    verify: Annotated[bool, typer.Option(help="Check every stored byte.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show one model: its files, digests, labels, base model, and its runs in MLflow.

    The runs are those that were linked on this machine; without any, MLFLOW_TRACKING_URI is asked.
    """
    from mlops.registry import ModelStore

    store = ModelStore()
    entry = store.get(tag)
    if verify:
        store.verify(entry)
    runs = _runs_of(entry)
    if as_json:
        console.print_json({**_as_dict(entry), "runs": [asdict(run) for run in runs]})
        return
    output = console.output()
    facts: dict[str, Any] = {
        "tag": entry.tag,
        "digest": entry.digest + ("  (every byte checked)" if verify else ""),
        "path": entry.path,
        "kind": f"{entry.manifest.kind}, {entry.manifest.framework}",
        "base": entry.manifest.base_tag,
        **{f"label {key}": value for key, value in entry.labels.items()},
        **entry.metadata,
    }
    for name, value in facts.items():
        if value is not None:
            output.print(f"{name:<16} {value}", soft_wrap=True)
    for run in runs:
        what = f", as {run.package}" if run.package else ""
        output.print(
            f"{run.relation:<16} run {run.run_id} ({run.run_name}), experiment {run.experiment}"
            f"{what}\n{'':<16} {run.url or run.tracking_uri}",
            soft_wrap=True,
        )
    for file in entry.manifest.files:
        output.print(f"  {file.size:>14,}  {file.sha256[:12]}  {file.path}", soft_wrap=True)


def _of_project(entries: list[StoredModel], project: str) -> list[StoredModel]:
    """Those of a project.

    Raises:
        PackagingError: there is no such project.
    """
    found = [entry for entry in entries if entry.labels.get("project") == project]
    if not found:
        projects = sorted({one for entry in entries if (one := entry.labels.get("project"))})
        there_are = f"there are {', '.join(projects)}" if projects else "no model is stored yet"
        raise PackagingError(
            f"there is no project {project!r}; {there_are}", "list_models", {"project": project}
        )
    return found


def _runs_of(entry: StoredModel) -> list[RunRecord]:
    """The runs that were linked to a model here, else the one that MLFLOW_TRACKING_URI knows."""
    from mlops.client import ask_mlflow, recall

    if (runs := recall(entry.digest)) or not (uri := os.environ.get("MLFLOW_TRACKING_URI")):
        return runs
    files_digest = entry.manifest.files_digest
    try:
        return ask_mlflow(
            uri, {"tag": entry.tag, "digest": entry.digest, "files_digest": files_digest}
        )
    except (ConfigError, TrackingError) as error:
        console.print_note(str(error))
        return []


def _as_dict(entry: StoredModel) -> dict[str, Any]:
    return {
        "tag": entry.tag,
        "digest": entry.digest,
        "path": str(entry.path),
        "labels": dict(entry.labels),
        "metadata": dict(entry.metadata),
        **asdict(entry.manifest),
    }
