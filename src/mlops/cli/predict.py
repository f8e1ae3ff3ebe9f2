"""`mlops predict`: ask a running service one thing."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any

import typer

from mlops.cli import console
from mlops.cli.arguments import examples
from mlops.cli.asking import (
    DEFAULT_URL,
    ApiKey,
    MaxTokens,
    Service,
    Temperature,
    Timeout,
    Url,
)
from mlops.errors import ConfigError, ServiceError

EPILOG = examples(
    'mlops predict "Explain artificial intelligence" --max-tokens 100',
    "mlops predict - --adapter formal < letter.txt",
    'mlops predict "Hello" --json',
)


def predict(
    text: Annotated[
        str, typer.Argument(metavar="TEXT", help="What to ask; - reads standard input.")
    ],
    url: Url = DEFAULT_URL,
    adapter: Annotated[
        str | None, typer.Option(help="Name of an adapter; by default the service's.")
    ] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    timeout: Timeout = 300,
    api_key: ApiKey = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Print the text as it is generated; by default in a terminal.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole answer as JSON.")
    ] = False,
) -> None:
    """Ask a running service."""
    if stream and as_json:
        raise typer.BadParameter("--stream prints text, and --json the whole answer: choose one")
    optional = {"adapter": adapter, "max_tokens": max_tokens, "temperature": temperature}
    body = {
        "text": _standard_input() if text == "-" else text,
        **{name: value for name, value in optional.items() if value is not None},
    }
    service = Service(url, timeout, api_key)
    if stream or (stream is None and not as_json and sys.stdout.isatty()):
        try:
            _stream(service, body)
        except ServiceError as error:
            # A model that is no language model has no stream, and need not when none was asked for.
            if stream or (error.details.get("status"), error.details.get("type")) != _NO_STREAM:
                raise
        else:
            return
    answer = service.predict(body)
    if as_json:
        console.print_json(answer)
    elif isinstance(answer["prediction"], str):
        console.print_text(answer["prediction"])
    else:
        typer.echo(json.dumps(answer["prediction"], ensure_ascii=False))


_NO_STREAM = (HTTPStatus.NOT_FOUND, "NotFound")


def _stream(service: Service, body: Mapping[str, Any]) -> None:
    text = console.StreamedText()
    try:
        for event in service.events("/predict", body):
            text.write(event.get("text", ""))
    finally:  # Ctrl-C, too
        text.close()


def _standard_input() -> str:
    """All of it, without the line break that ends it.

    Raises:
        ConfigError: it is no text.
    """
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as exc:
        raise ConfigError(f"standard input is not text in UTF-8: {exc.reason}") from exc
