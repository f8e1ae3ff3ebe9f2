"""`mlops gc`: the bytes of deleted models, freed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from mlops.cli import console
from mlops.cli.arguments import examples
from mlops.counts import count

EPILOG = examples("mlops gc", "mlops gc --dry-run")


def gc(
    dry_run: Annotated[bool, typer.Option(help="Only say what would be freed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Free what deleted models and killed commands left in the model store.

    Packaging does so too. Models that are there, and services that run, keep all they use; while
    another command writes to the store, this one refuses.
    """
    from mlops.registry import ModelStore

    garbage = ModelStore().collect_garbage(dry_run=dry_run)
    if as_json:
        console.print_json({**asdict(garbage), "dry_run": dry_run})
    elif not garbage.num_files:
        typer.echo("nothing to free")
    else:
        verb = "would free" if dry_run else "freed"
        files = count(garbage.num_files, "file")
        typer.echo(f"{verb} {garbage.num_bytes / 2**20:.1f} MB in {files}")
