"""`mlops push`: a Bento and its models to where the nodes of a cluster fetch them from."""

from __future__ import annotations

from typing import Annotated

import typer

from mlops.cli import console
from mlops.cli.arguments import examples

EPILOG = examples(
    "mlops push helpdesk:1.0.0 /mnt/shared/models",
    "mlops push helpdesk s3://team-models/production",
)


def push(
    tag: Annotated[
        str,
        typer.Argument(
            metavar="NAME[:VERSION]",
            help="Bento, or model that has no Bento; the newest where no version is given.",
        ),
    ],
    location: Annotated[
        str,
        typer.Argument(metavar="LOCATION", help="Folder that all nodes see, or URL (s3://…)."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Copy a Bento and its models to a shared place; what is there already is not copied."""
    from mlops.cli.progress import bytes_progress
    from mlops.registry.index import local_index, newest
    from mlops.registry.location import without_secrets
    from mlops.registry.shared import publish

    tag = newest(tag)
    with bytes_progress(console.errors()) as progress:
        pushing = progress.add_task("pushing", total=local_index(tag).size)
        digest = publish(
            tag, location, progress=lambda num_bytes: progress.advance(pushing, num_bytes)
        )
    place = without_secrets(location)
    if as_json:
        console.print_json({"tag": tag, "digest": digest, "location": place})
        return
    typer.echo(f"pushed  {tag}")
    typer.echo(f"        {digest}")
    typer.echo(f"to      {place}")
