"""`mlops package`: from a checkpoint to a stored model and a Bento."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

EPILOG = """Examples:

    mlops package outputs/checkpoints/final --name helpdesk --version 1.0.0

    mlops package outputs/adapters/tone --base-model models/llama --project support

    mlops package mlx-community/Llama-3.2-1B-Instruct-4bit --label stage=production
"""


def package(
    model_path: Annotated[
        str, typer.Argument(help="Folder or file to package, or a Hugging Face id.")
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of the tag; by default the folder's.")
    ] = None,
    version: Annotated[
        str | None, typer.Option(help="major.minor.patch; by default made from the content.")
    ] = None,
    project: Annotated[str, typer.Option(help="Project the model belongs to.")] = "default",
    service_name: Annotated[
        str | None, typer.Option(help="Name of the Bento; by default the model's.")
    ] = None,
    framework: Annotated[
        str | None, typer.Option(help="What the files must be: mlx, transformers, pytorch, …")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Folder, tag or hub id of an adapter's base model.")
    ] = None,
    description: Annotated[str | None, typer.Option(help="For people.")] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE; can be given several times.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Glob of files to store; several times.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Glob of files to leave out; several times.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML or TOML file with the service's settings.")
    ] = None,
    bento: Annotated[bool, typer.Option(help="Also build the Bento.")] = True,
    docker: Annotated[bool, typer.Option(help="Also build its container image.")] = False,
    track: Annotated[
        bool, typer.Option(help="Link the package to a run of the project in MLflow.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Store a trained model under a tag and build its Bento."""
    from rich.console import Console

    from mlops.cli.progress import bytes_progress
    from mlops.client import create_client
    from mlops.serving.bentoml.config import BentoMLConfig
    from mlops.serving.bentoml.packager import ModelPackager, PackageConfig

    packager = ModelPackager(
        PackageConfig(
            model_path=model_path,
            model_name=name,
            model_version=version,
            model_framework=framework,
            service_name=service_name,
            project_name=project,
            description=description,
            labels=dict(_key_value(item) for item in label or []),
            include_patterns=include or [],
            exclude_patterns=exclude or [],
            base_model=base_model,
            service=BentoMLConfig.load(config) if config else None,
        )
    )
    checkpoint = packager.validate_model_path()
    console = Console(stderr=True, markup=False)
    console.print(f"{checkpoint.path}: {checkpoint.description}", highlight=False)
    num_bytes = sum(file.size for file in packager.collect_model_files())
    with bytes_progress(console) as progress:
        storing = progress.add_task("storing", total=num_bytes)
        result = packager.package_model(
            build_bento=bento,
            create_docker=docker,
            tracking=create_client(project) if track else None,
            progress=lambda read: progress.advance(storing, read),
        )
    if as_json:
        typer.echo(json.dumps(result, default=vars, indent=1))
    else:
        _print_result(result)


def _key_value(item: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not key or not equals:
        raise typer.BadParameter(f"--label takes KEY=VALUE, not {item!r}")
    return key, value


def _print_result(result: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    word = "unchanged" if result["unchanged"] else "stored"
    size_mb = result["size_bytes"] / 2**20
    console.print(f"model  {result['model_tag']}  {word}, {size_mb:.1f} MB")
    console.print(f"       {result['model_digest']}", style="dim")
    if result["base_model_tag"]:
        console.print(f"base   {result['base_model_tag']}")
    for old, new in result["renamed"].items():
        console.print(f"note   {old!r} is no part of a tag; it became {new!r}", style="yellow")
    link = result["tracking"]
    if link is not None:
        console.print(f"run    {'linked' if link.linked else f'queued: {link.reason}'}")
    if result["bento_tag"]:
        console.print(f"bento  {result['bento_tag']}")
        console.print(f"\nServe it:  mlops serve {result['bento_tag']}")
