"""`mlops deploy`, `status`, `scale` and `undeploy`: services on a Ray cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mlops.serving.bentoml.config import BentoMLConfig
    from mlops.serving.ray import Deployed

DEPLOY_EPILOG = """Examples:

    mlops deploy helpdesk:1.0.0 --ray-address local

    mlops deploy helpdesk:1.1.0 --replicas 1:4

    mlops deploy helpdesk:1.1.0 --adapter formal=formal:1.0.0

    mlops deploy helpdesk:1.1.0 --dry-run > serve.yaml && serve deploy serve.yaml
"""
STATUS_EPILOG = "Example: mlops status --ray-address 10.0.0.1:6379"
SCALE_EPILOG = """Examples:

    mlops scale support-helpdesk 3

    mlops scale support-helpdesk 1:8
"""
UNDEPLOY_EPILOG = "Example: mlops undeploy support-helpdesk"

Address = Annotated[
    str | None,
    typer.Option(help="The cluster: auto (one that runs here), HOST:PORT, or local (start one)."),
]
Application = Annotated[str, typer.Argument(help="The application, as `mlops status` names it.")]
Timeout = Annotated[float, typer.Option(help="Seconds to wait until it answers.")]


def deploy(
    bento: Annotated[str, typer.Argument(help="Bento tag; name alone is the newest.")],
    ray_address: Address = None,
    replicas: Annotated[
        str | None, typer.Option(help="A number, or the fewest and the most: 1:4.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="hybrid, or ray_serve: without BentoML in the replicas.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Settings, as YAML or TOML.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="Another adapter, NAME=TAG; as often as needed.")
    ] = None,
    model_source: Annotated[
        str | None, typer.Option(help="Folder or URL where all nodes fetch the model from.")
    ] = None,
    route_prefix: Annotated[str | None, typer.Option(help="Path to answer below.")] = None,
    host: Annotated[str | None, typer.Option(help="Address that Ray Serve listens on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the same.")] = None,
    timeout: Timeout = 600,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what `serve deploy` takes; do nothing.")
    ] = False,
) -> None:
    """Run a Bento on a Ray cluster, or update it there without losing a request."""
    from mlops.serving.ray.cluster import LOCAL

    settings = _settings(
        config,
        ray={"model_source": model_source, "route_prefix": route_prefix},
        ray_address=ray_address,
        serving_backend=backend,
        host=host,
        port=port,
        **_replicas(replicas),
    )
    adapters = _adapters(adapter or [])
    if dry_run:
        _print_serve_config(bento, settings, adapters)
        return
    from mlops.serving.ray import deploy as deploy_bento

    with _progress(f"deploying {bento}") as tell:
        deployed = deploy_bento(
            bento, settings, adapters=adapters, timeout_s=timeout, progress=tell
        )
    _print_deployed(deployed)
    if settings.ray_address == LOCAL:
        typer.echo("The cluster is this command's own: Ctrl-C ends both.")
        _wait_for_signal(deployed.ray_address)
        _end(deployed.application, deployed.ray_address)


def status(
    ray_address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List what is deployed on a Ray cluster."""
    from mlops.serving.ray import status as find_running
    from mlops.serving.ray.deploy import describe

    running = find_running(ray_address)
    if as_json:
        rows = [
            {
                "application": one.name,
                "project": one.plan.config.project_name,
                "bento_tag": one.plan.tag,
                "digest": one.plan.digest,
                "status": one.status,
                "message": one.message,
                "replicas": dict(one.replicas),
                "target_replicas": one.target,
                "route_prefix": one.plan.route_prefix,
                "adapters": [*one.plan.adapters, *one.plan.added],
            }
            for one in running
        ]
        typer.echo(json.dumps(rows, indent=1))
        return
    if not running:
        typer.echo("nothing is deployed; `mlops deploy NAME:TAG` does that")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("application", "project", "bento", "status", "replicas", "route"):
        table.add_column(heading, overflow="fold")
    for one in running:
        plan = one.plan
        cells = (one.name, plan.config.project_name, plan.tag, one.status)
        table.add_row(*map(Text, (*cells, describe(one), plan.route_prefix)))
    Console().print(table)
    for one in running:
        if one.message:
            from mlops.serving.ray.cluster import reason_of

            typer.echo(f"{one.name}: {reason_of(one.message)}")


def scale(
    application: Application,
    replicas: Annotated[str, typer.Argument(help="A number, or the fewest and the most: 1:4.")],
    ray_address: Address = None,
    timeout: Timeout = 600,
) -> None:
    """Change how many replicas an application has."""
    from mlops.serving.ray import scale as scale_application

    low, high = parse_replicas(replicas)
    with _progress(f"scaling {application}") as tell:
        deployed = scale_application(
            application, (low, high), ray_address, timeout_s=timeout, progress=tell
        )
    typer.echo(f"{application}: {deployed.num_replicas} replicas answer at {deployed.url}")


def undeploy(application: Application, ray_address: Address = None) -> None:
    """Take an application away, once it has answered what it is answering."""
    from mlops.serving.ray import undeploy as take_away

    with _progress(f"taking {application} away"):
        take_away(application, ray_address)
    typer.echo(f"{application} is gone")


def parse_replicas(text: str) -> tuple[int, int]:
    """The fewest and the most of `2` or `1:4`.

    Raises:
        ConfigError: the text is neither.
    """
    from mlops.errors import ConfigError

    low, colon, high = text.partition(":")
    try:
        numbers = int(low), int(high if colon else low)
    except ValueError as exc:
        raise ConfigError(
            f"replicas {text!r} are not allowed; use a number such as 2, or 1:4"
        ) from exc
    return numbers


def _replicas(text: str | None) -> dict[str, int]:
    if text is None:
        return {}
    low, high = parse_replicas(text)
    return {"ray_min_replicas": low, "ray_max_replicas": high}


def _settings(config: Path | None, *, ray: Mapping[str, Any], **arguments: Any) -> BentoMLConfig:
    """The settings of the command line above those of the file."""
    from mlops.serving.bentoml.config import BentoMLConfig, ServingBackend

    given = {name: value for name, value in arguments.items() if value is not None}
    of_ray = {name: value for name, value in ray.items() if value is not None}
    settings = BentoMLConfig.load(config, **given, **({"ray": of_ray} if of_ray else {}))
    if "serving_backend" not in given and not settings.uses_ray:
        settings.serving_backend = ServingBackend.HYBRID
    settings.to_ray_serve_config()  # refuses what cannot be
    return settings


def _adapters(given: list[str]) -> dict[str, str]:
    from mlops.errors import ConfigError

    pairs = [one.partition("=") for one in given]
    for number, (name, equals, tag) in enumerate(pairs):
        is_new = all(name != before for before, _, _ in pairs[:number])
        if not (name and equals and tag and is_new):
            raise ConfigError(
                f"--adapter {name + equals + tag!r} is not allowed; use NAME=TAG, such as "
                "formal=formal:1.0.0"
            )
    return {name: tag for name, _, tag in pairs}


def _print_serve_config(bento: str, settings: BentoMLConfig, adapters: dict[str, str]) -> None:
    import yaml

    from mlops.serving.ray.deploy import with_adapters
    from mlops.serving.ray.deployment import Plan

    plan = with_adapters(Plan.make(bento, settings), adapters)
    typer.echo(yaml.safe_dump(plan.to_serve_config(), sort_keys=False, allow_unicode=True))


def _print_deployed(deployed: Deployed) -> None:
    typer.echo(f"{deployed.bento_tag} answers at {deployed.url}")
    typer.echo(f"  application  {deployed.application}, {deployed.num_replicas} replicas")
    typer.echo(f"  cluster      {deployed.ray_address}")
    if deployed.dashboard_url:
        typer.echo(f"  dashboard    {deployed.dashboard_url}")
    if deployed.log_folder:
        typer.echo(f"  logs         {deployed.log_folder}/serve")
    typer.echo(f'  ask          mlops predict "Hello" --url {deployed.url}')


@contextmanager
def _progress(title: str) -> Iterator[Any]:
    """A line that says how far it is; where nobody looks, one for each change."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        last = ""

        def tell_once(state: str) -> None:
            nonlocal last
            if state != last:
                last = state
                typer.echo(f"{title}: {state}", err=True)

        yield tell_once
        return
    with console.status(title) as line:
        yield lambda state: line.update(f"{title}: {state}")


def _wait_for_signal(ray_address: str) -> None:
    """Return at Ctrl-C or SIGTERM; Ray's own handlers would end the process at once.

    Raises:
        DeploymentError: the cluster is gone.
    """
    import signal
    import threading

    from mlops.serving.ray.cluster import check_listens

    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    while not stopped.wait(0.5):  # a signal is seen only between two waits
        check_listens(ray_address)


def _end(application: str, ray_address: str) -> None:
    """Let running requests end, and the cluster after them.

    Raises:
        DeploymentError: the cluster is gone already: a signal has reached all of its processes.
    """
    import threading

    import ray

    from mlops.serving.ray import undeploy as take_away
    from mlops.serving.ray.cluster import check_listens

    typer.echo("ending: running requests are answered first", err=True)
    ending = threading.Thread(target=take_away, args=(application, "local"), daemon=True)
    ending.start()
    while ending.is_alive():
        check_listens(ray_address)
        ending.join(0.5)
    ray.shutdown()
