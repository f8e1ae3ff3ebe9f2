"""`mlops serve`: run a Bento, a service or a model."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mlops.cli.arguments import adapters_by_name, examples
from mlops.hardware.home import expand

EPILOG = examples(
    "mlops serve helpdesk:1.0.0 --port 3000",
    "mlops serve models/llama --adapter formal=outputs/formal --adapter brief=outputs/brief",
    "mlops serve helpdesk --config mlops.yaml --api-key-file keys.txt --max-batch-size 16",
    "mlops serve service:svc --reload",
)

_SERVICE_FILES = ("bento.yaml", "bentofile.yaml", "service.py")
_SERVICE = """from mlops.serving.bentoml.service import create_bentoml_service

svc = create_bentoml_service({model!r}, service_name={name!r})
"""


def serve(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="Bento tag, service (module:variable or folder), or a model: folder, tag, hub id. "
            "A tag without a version is the newest.",
        ),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="One more adapter that a request can name: folder, tag or hub id; several times.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML or TOML file with settings, which win over the service's own."),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with a key on each line; a request must carry one.")
    ] = None,
    max_batch_size: Annotated[
        int | None, typer.Option(min=1, max=1024, help="The most requests computed together.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port; by default the service's, 3000."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address; by default 127.0.0.1.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=256, help="Processes; each loads its own copy of the model."),
    ] = None,
    reload: Annotated[
        bool, typer.Option(help="Start again when the code or the model changes.")
    ] = False,
) -> None:
    """Serve a Bento, a service or a model over HTTP."""
    import tempfile

    from mlops.registry import ModelStore

    ModelStore()  # or what asks BentoML for a Bento would end with a traceback
    _hand_on(adapters_by_name(adapter or []), config, api_key_file, max_batch_size)
    options = [
        *(["--port", str(port)] if port is not None else []),
        *(["--host", host] if host is not None else []),
        *(["--workers", str(workers)] if workers is not None else []),
        *(["--reload"] if reload else []),
    ]
    if is_service(target):
        _bentoml("serve", target, *options)
    with contextlib.ExitStack() as stack:
        # SIGTERM would leave the folder behind: while it is made, the signal waits; then, until the
        # server has its own handler, it ends what is under way.
        arrived: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: arrived.append(number))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mlops-service-"))
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        if arrived:
            sys.exit(128 + arrived[0])
        Path(folder, "service.py").write_text(_service_of(target), encoding="utf-8")
        _bentoml("serve", "service:svc", "--working-dir", folder, *options)


def _hand_on(
    adapters: dict[str, str | Path],
    config: Path | None,
    api_key_file: Path | None,
    max_batch_size: int | None,
) -> None:
    """Check what wins over the service's own, and put it where its processes find it.

    Raises:
        ConfigError: a setting holds what it may not.
    """
    from mlops.serving.bentoml.config import BentoMLConfig
    from mlops.serving.bentoml.serve_options import ServeOptions

    typed = {
        "--adapter": adapters,
        "--config": config,
        "--api-key-file": api_key_file,
        "--max-batch-size": max_batch_size,
    }
    names = tuple(name for name, value in typed.items() if value)
    if not names:
        return
    given: dict[str, Any] = {}
    if max_batch_size:
        given["max_batch_size"] = max_batch_size
    if api_key_file:
        given["http"] = {"api_key_file": str(api_key_file)}
    settings = BentoMLConfig.values(config, **given)
    if http := settings.get("http"):
        for name in {"api_key_file", "adapter_folder"} & set(http):
            # The service runs in another folder.
            http[name] = http[name] and str(expand(http[name]).absolute())
    places = {name: str(place) for name, place in adapters.items()}
    ServeOptions(names, settings, places).hand_on()


def is_service(target: str) -> bool:
    """True for what `bentoml serve` takes as it is; False for a model."""
    path = expand(target)
    if path.exists():
        return path.suffix == ".py" or any((path / name).is_file() for name in _SERVICE_FILES)
    return _is_bento(target) or _is_importable(target)


def _is_bento(tag: str) -> bool:
    import bentoml
    from bentoml.exceptions import BentoMLException

    try:
        bentoml.bentos.get(tag)
    except (BentoMLException, ValueError):
        return False
    return True


def _is_importable(target: str) -> bool:
    module, _, variable = target.partition(":")
    if Path(module).is_file():  # service.py:svc
        return True
    if not all(part.isidentifier() for part in module.split(".")):
        return False
    if Path(*module.split(".")).with_suffix(".py").is_file():
        return True
    try:
        return bool(variable) and importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _service_of(model: str) -> str:
    """The source of a service for a model, named after it."""
    path = expand(model)
    if path.exists():
        model = str(path.resolve())
        name = path.resolve().name
    else:
        name = model.partition("@")[0].rpartition("/")[2].partition(":")[0]
    name = re.sub(r"[^a-z0-9._-]+", "-", name.lower())[:63].strip("-._")
    return _SERVICE.format(model=model, name=name or "model")


def _bentoml(*arguments: str) -> None:
    """Run BentoML's command line in this process; ends it."""
    from bentoml_cli.cli import cli

    cli.main(args=list(arguments), prog_name="bentoml")
