"""`mlops serve` and `mlops predict`: run a service, and ask one."""

from __future__ import annotations

import importlib.util
import json
import re
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import httpx

SERVE_EPILOG = """Examples:

    mlops serve helpdesk:1.0.0 --port 3000

    mlops serve models/llama

    mlops serve service:svc --reload
"""

PREDICT_EPILOG = """Examples:

    mlops predict "Explain artificial intelligence" --max-tokens 100

    mlops predict "Hello" --adapter formal --json
"""

KEY_VARIABLE = "MLOPS_API_KEY"

_MAX_FOREIGN = 200
_SERVICE_FILES = ("bento.yaml", "bentofile.yaml", "service.py")
_SERVICE = """from mlops.serving.bentoml.service import create_bentoml_service

svc = create_bentoml_service({model!r}, service_name={name!r})
"""


def serve(
    target: Annotated[
        str,
        typer.Argument(
            help="Bento tag, service (module:variable or folder), or a model: folder, tag, hub id."
        ),
    ],
    port: Annotated[int | None, typer.Option(help="Port; by default the service's, 3000.")] = None,
    host: Annotated[str | None, typer.Option(help="Address; by default 127.0.0.1.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes; each loads its own copy of the model.")
    ] = None,
    reload: Annotated[
        bool, typer.Option(help="Start again when the code or the model changes.")
    ] = False,
) -> None:
    """Serve a Bento, a service or a model over HTTP."""
    import tempfile

    options = [
        *(["--port", str(port)] if port is not None else []),
        *(["--host", host] if host is not None else []),
        *(["--workers", str(workers)] if workers is not None else []),
        *(["--reload"] if reload else []),
    ]
    if is_service(target):
        _bentoml("serve", target, *options)
    with tempfile.TemporaryDirectory(prefix="mlops-service-") as folder:
        Path(folder, "service.py").write_text(_service_of(target), encoding="utf-8")
        _bentoml("serve", "service:svc", "--working-dir", folder, *options)


def is_service(target: str) -> bool:
    """True for what `bentoml serve` takes as it is; False for a model."""
    path = Path(target).expanduser()
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
    path = Path(model).expanduser()
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


def predict(
    text: Annotated[str, typer.Argument(help="What to ask.")],
    url: Annotated[str, typer.Option(help="Where the service is.")] = "http://127.0.0.1:3000",
    adapter: Annotated[
        str | None, typer.Option(help="Name of an adapter; by default the service's.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="The most tokens to generate.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is the likeliest text.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the answer.")] = 300,
    api_key: Annotated[
        str | None, typer.Option(envvar=KEY_VARIABLE, help="For a service that wants one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole answer.")] = False,
) -> None:
    """Ask a running service."""
    optional = {"adapter": adapter, "max_tokens": max_tokens, "temperature": temperature}
    given = {name: value for name, value in optional.items() if value is not None}
    answer = ask(url, {"text": text, **given}, timeout, api_key)
    if as_json:
        typer.echo(json.dumps(answer, ensure_ascii=False, indent=1))
    elif isinstance(answer["prediction"], str):
        typer.echo(answer["prediction"])
    else:
        typer.echo(json.dumps(answer["prediction"], ensure_ascii=False))


def ask(
    url: str, body: dict[str, Any], timeout_s: float, api_key: str | None = None
) -> dict[str, Any]:
    """Post a request to the service at `url` and return its answer.

    Args:
        url: without a scheme it is http.

    Raises:
        ServiceError: nothing answers there, it is no service of this kind, or it refused.
    """
    import httpx

    from mlops.errors import ServiceError

    if "://" not in url:
        url = f"http://{url}"
    details = {"url": url}
    key = (api_key or "").strip()
    if not key.isprintable():  # httpx would show it
        raise ServiceError("the API key must be one line: several are in it", "predict", details)
    headers = {b"Authorization": f"Bearer {key}".encode()} if key else {}
    try:
        # A proxy has no business between this machine and itself.
        local = httpx.URL(url).host in {"localhost", "127.0.0.1", "::1"}
        with httpx.Client(timeout=timeout_s, trust_env=not local) as client:
            response = client.post(f"{url.rstrip('/')}/predict", json=body, headers=headers)
    except httpx.ConnectError as exc:
        raise ServiceError(
            f"no service answers at {url}: start one with `mlops serve TARGET`, or give its "
            "address with --url",
            "predict",
            details,
        ) from exc
    except httpx.TimeoutException as exc:
        raise ServiceError(
            f"{url} gave no answer within {timeout_s:g} s; --timeout waits longer",
            "predict",
            details,
        ) from exc
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise ServiceError(f"{url} cannot be asked: {exc}", "predict", details) from exc
    try:
        answer = response.json()
        if response.is_success:
            return {"prediction": answer["prediction"], **answer}
        reason = answer["error"]["message"]
    except (ValueError, KeyError, TypeError) as exc:
        raise ServiceError(_foreign(url, response), "predict", details) from exc
    if response.status_code == httpx.codes.UNAUTHORIZED:
        reason, _, _ = reason.partition(":")
        reason += f": give one of its keys with --api-key or {KEY_VARIABLE}"
    raise ServiceError(f"the service refused: {reason}", "predict", details)


def _foreign(url: str, response: httpx.Response) -> str:
    """What to say of an answer that no service of this toolkit has written.

    Ray Serve's proxy writes some: for a path that is not there, a full queue, a replica that died.
    """
    first = next((line.strip() for line in response.text.splitlines() if line.strip()), "")
    is_plain = first.isprintable() and "<" not in first
    told = f": {first[:_MAX_FOREIGN]}" if first and is_plain else ""
    code = response.status_code
    if code == HTTPStatus.TOO_MANY_REQUESTS or code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return f"{url} cannot answer now (status {code}){told}"
    return f"what answers at {url} is no service of this toolkit (status {code}){told}"
