"""`mlops logs`: what a service on this machine has logged; the same as `bentoml logs`."""

from __future__ import annotations

from typing import Annotated

import typer

from mlops.cli.arguments import examples

EPILOG = examples("mlops logs helpdesk", "mlops logs helpdesk:1.0.0 --lines 50 --follow")


def logs(
    service: Annotated[
        str, typer.Argument(metavar="NAME[:VERSION]", help="The service, or one Bento of it.")
    ],
    lines: Annotated[
        int | None, typer.Option("--lines", "-n", min=0, help="Only so many of the last lines.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new lines until interrupted.")
    ] = False,
) -> None:
    """Print the log of a service that was served on this machine."""
    from mlops.serving.bentoml.commands import logs as bentoml_logs

    options = [
        *(["--lines", str(lines)] if lines is not None else []),
        *(["--follow"] if follow else []),
    ]
    bentoml_logs.main(args=[*options, "--", service], prog_name="mlops logs")
