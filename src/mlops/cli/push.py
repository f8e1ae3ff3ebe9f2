"""`mlops push`: a Bento and its models to where the nodes of a cluster fetch them from."""

from __future__ import annotations

from typing import Annotated

import typer

EPILOG = """Examples:

    mlops push helpdesk:1.0.0 /mnt/shared/models

    mlops push helpdesk:1.0.0 s3://team-models/production
"""


def push(
    tag: Annotated[
        str, typer.Argument(metavar="NAME:TAG", help="Bento, or model that has no Bento.")
    ],
    location: Annotated[str, typer.Argument(help="Folder that all nodes see, or URL (s3://…).")],
) -> None:
    """Copy a Bento and its models to a shared place; what is there already is not copied."""
    from rich.console import Console

    from mlops.cli.progress import bytes_progress
    from mlops.registry.index import local_index
    from mlops.registry.location import without_secrets
    from mlops.registry.shared import publish

    with bytes_progress(Console(stderr=True, markup=False)) as progress:
        pushing = progress.add_task("pushing", total=local_index(tag).size)
        digest = publish(
            tag, location, progress=lambda num_bytes: progress.advance(pushing, num_bytes)
        )
    typer.echo(f"pushed  {tag}")
    typer.echo(f"        {digest}")
    typer.echo(f"to      {without_secrets(location)}")
