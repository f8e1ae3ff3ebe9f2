"""`mlops run -- COMMAND`: start any program that uses MLX with the optimized BLAS in place."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer

from mlops.cli import console
from mlops.cli.arguments import examples

EPILOG = examples(
    "mlops run -- python train.py",
    "mlops run -- mlx_lm.lora --model models/base --train --data data",
)


def run(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND", help="What to start.")],
) -> None:
    """Start a program that uses MLX with the fast BLAS in place; its exit status is kept."""
    from mlops.hardware import launch_environment

    with warnings.catch_warnings(record=True, action="always") as caught:
        added = launch_environment()
    for warning in caught:
        console.print_note(str(warning.message))
    sys.stdout.flush()
    try:
        os.execvpe(command[0], command, {**os.environ, **added})  # noqa: S606
    except OSError as error:
        # What a shell answers: 127 when there is no such command, 126 when it cannot be started.
        console.print_error(
            f"{command[0]} cannot be started ({error.strerror}); check its name and your PATH."
        )
        raise typer.Exit(127 if isinstance(error, FileNotFoundError) else 126) from None
