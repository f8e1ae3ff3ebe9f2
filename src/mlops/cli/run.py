"""`mlops run -- COMMAND`: start any program that uses MLX with the optimized BLAS in place."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer


def run(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="What to start.")],
) -> None:
    """Start a program that uses MLX with the fast BLAS in place; its exit status is kept.

    \b
    Examples:
      mlops run -- python train.py
      mlops run -- mlx_lm.lora --model models/base --train --data data
    """
    from mlops.hardware import launch_environment

    with warnings.catch_warnings(record=True, action="always") as caught:
        added = launch_environment()
    for warning in caught:
        typer.secho(str(warning.message), fg=typer.colors.YELLOW, err=True)
    sys.stdout.flush()
    try:
        os.execvpe(command[0], command, {**os.environ, **added})  # noqa: S606
    except OSError as error:
        # What a shell answers: 127 when there is no such command, 126 when it cannot be started.
        typer.secho(
            f"{command[0]} cannot be started ({error.strerror}); check its name and your PATH.",
            fg=typer.colors.RED,
            err=True,
        )
        raise typer.Exit(127 if isinstance(error, FileNotFoundError) else 126) from None
