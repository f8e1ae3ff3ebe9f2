"""`mlops demo`: the whole way from training to an answer over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlops.cli.arguments import examples

EPILOG = examples(
    "mlops demo",
    "mlops demo --ray",
    "mlops demo --model mlx-community/Llama-3.2-1B-Instruct-4bit --keep-serving",
)


def demo(
    model: Annotated[
        str | None, typer.Option(help="Your own base model: a folder or a Hugging Face id.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where everything is written.")] = Path(".demo"),
    keep_serving: Annotated[
        bool, typer.Option("--keep-serving", help="Leave the service running until Ctrl-C.")
    ] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="Serve on a Ray cluster of two nodes, started here.")
    ] = False,
) -> None:
    """Train, track, package, serve and ask: the whole way."""
    from mlops.demo.run import run_demo

    run_demo(model, folder, keep_serving, ray)
