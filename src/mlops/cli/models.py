"""`mlops models`: what is in the model store."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mlops.registry import StoredModel

models = typer.Typer(help="What is in the model store.", no_args_is_help=True)


@models.command("list", epilog="Example: mlops models list --project support")
def list_models(
    project: Annotated[str | None, typer.Option(help="Only this project's models.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List every model, with its project, kind, base and size."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mlops.registry import ModelStore

    entries = [
        entry
        for entry in ModelStore().list()
        if project is None or entry.labels.get("project") == project
    ]
    if as_json:
        typer.echo(json.dumps([_as_dict(entry) for entry in entries], indent=1))
        return
    if not entries:
        typer.echo("no models yet; `mlops package FOLDER` stores one")
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
    Console().print(table)


@models.command("show", epilog="Example: mlops models show helpdesk:1.0.0 --verify")
def show_model(
    tag: Annotated[str, typer.Argument(help="name:version; name alone is the newest.")],
    verify: Annotated[bool, typer.Option(help="Check every stored byte.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show one model: its files, digests, labels and base model."""
    from rich.console import Console

    from mlops.registry import ModelStore

    store = ModelStore()
    entry = store.get(tag)
    if verify:
        store.verify(entry)
    if as_json:
        typer.echo(json.dumps(_as_dict(entry), indent=1))
        return
    console = Console(highlight=False, markup=False)
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
            console.print(f"{name:<16} {value}", soft_wrap=True)
    for file in entry.manifest.files:
        console.print(f"  {file.size:>14,}  {file.sha256[:12]}  {file.path}", soft_wrap=True)


def _as_dict(entry: StoredModel) -> dict[str, Any]:
    return {
        "tag": entry.tag,
        "digest": entry.digest,
        "path": str(entry.path),
        "labels": dict(entry.labels),
        "metadata": dict(entry.metadata),
        **asdict(entry.manifest),
    }
