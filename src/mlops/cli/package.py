"""`mlops package`: from a checkpoint to a stored model and a Bento."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from mlops.cli import console
from mlops.cli.arguments import adapters_by_name, examples, pairs

EPILOG = examples(
    "mlops package outputs/checkpoints/final --name helpdesk --version 1.0.0",
    "mlops package outputs/adapters/tone --base-model models/llama --project support",
    "mlops package models/llama --adapter formal=outputs/formal --adapter brief=outputs/brief",
    "mlops package mlx-community/Llama-3.2-1B-Instruct-4bit --label stage=production",
)


def package(
    model_path: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Folder or file to package, or a Hugging Face id."),
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of the tag; by default the folder's.")
    ] = None,
    version: Annotated[
        str | None,
        typer.Option(
            metavar="MAJOR.MINOR.PATCH",
            help="Version of the tag, such as 1.2.3 or 1.2.3-rc.1; by default made from the "
            "content.",
        ),
    ] = None,
    project: Annotated[str, typer.Option(help="Project the model belongs to.")] = "default",
    service_name: Annotated[
        str | None, typer.Option(help="Name of the Bento; by default the model's.")
    ] = None,
    framework: Annotated[
        str | None,
        typer.Option(help="What the files must be: mlx, transformers, pytorch, onnx or coreml."),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Folder, tag or hub id of an adapter's base model.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="An adapter of a full model, by the name that a request gives: folder, tag or "
            "hub id; several times.",
        ),
    ] = None,
    description: Annotated[str | None, typer.Option(help="For people.")] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="For searches; several times."),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            help="Glob of files to store in place of the model's own, or besides them what is "
            "otherwise left out; several times."
        ),
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
    from mlops.cli.progress import bytes_progress
    from mlops.client import create_client
    from mlops.serving.bentoml.config import BentoMLConfig
    from mlops.serving.bentoml.packager import ModelPackager, PackageConfig

    if docker and not bento:
        raise typer.BadParameter("--docker makes an image of the Bento: leave --no-bento out")
    packager = ModelPackager(
        PackageConfig(
            model_path=model_path,
            model_name=name,
            model_version=version,
            model_framework=framework,
            service_name=service_name,
            project_name=project,
            description=description,
            labels=pairs(label or [], "--label", "KEY=VALUE"),
            include_patterns=include or [],
            exclude_patterns=exclude or [],
            base_model=base_model,
            adapters=adapters_by_name(adapter or []),
            service=BentoMLConfig.load(config) if config else None,
        )
    )
    checkpoint = packager.validate_model_path()
    errors = console.errors()
    errors.print(f"{checkpoint.path}: {checkpoint.description}")
    num_bytes = sum(file.size for file in packager.collect_model_files())
    with _warnings_in_result(), bytes_progress(errors) as progress:
        task = progress.add_task("checking", total=num_bytes)  # a model is built first
        result = packager.package_model(
            build_bento=bento,
            create_docker=docker,
            tracking=create_client(project) if track else None,
            progress=lambda read: progress.update(task, description="storing", advance=read),
        )
    if as_json:
        console.print_json(result, default=vars)
    else:
        _print_result(result)


@contextlib.contextmanager
def _warnings_in_result() -> Iterator[None]:
    """The packager logs what its result says as well; a terminal shows it once."""
    from mlops.serving.bentoml.packager import result_logger

    level = result_logger.level
    result_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        result_logger.setLevel(level)


def _print_result(result: dict[str, Any]) -> None:
    from mlops.checkpoints.refusal import examples as first_of

    output = console.output()
    word = "unchanged" if result["unchanged"] else "stored"
    size_mb = result["size_bytes"] / 2**20
    output.print(f"model    {result['model_tag']}  {word}, {size_mb:.1f} MB")
    output.print(f"         {result['model_digest']}", style="dim")
    if result["base_model_tag"]:
        output.print(f"base     {result['base_model_tag']}")
    for name, tag in result["adapter_tags"].items():
        output.print(f"adapter  {name}  {tag}")
    for old, new in result["renamed"].items():
        output.print(f"note     {old!r} is no part of a tag; it became {new!r}", style="yellow")
    for warning in result["warnings"]:
        output.print(f"warning  {warning}", style="yellow")
    if result["left_out"]:
        output.print(f"left out {first_of(result['left_out'], 10)}; --include asks for more")
    link = result["tracking"]
    if link is not None:
        waits = f"{'queued' if link.queued else 'not linked'}: {link.reason}"
        output.print(f"run      {'linked' if link.linked else waits}")
    if result["bento_tag"]:
        output.print(f"bento    {result['bento_tag']}")
    if result["docker_image"]:
        output.print(f"image    {result['docker_image']}")
    if result["bento_tag"]:
        output.print(f"\nServe it:  mlops serve {result['bento_tag']}")
