"""`mlops deploy`, `status`, `scale` and `undeploy`: services on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlops.cli import console
from mlops.cli.arguments import examples, pairs
from mlops.counts import count

if TYPE_CHECKING:
    from mlops.serving.bentoml.config import BentoMLConfig
    from mlops.serving.ray import Deployed
    from mlops.serving.ray.running import RunningApplication

DEPLOY_EPILOG = examples(
    "mlops deploy helpdesk:1.0.0 --ray-address local",
    "mlops deploy helpdesk --replicas 1:4",
    "mlops deploy helpdesk:1.1.0 --adapter formal=formal:1.0.0",
    "mlops deploy helpdesk:1.1.0 --dry-run > serve.yaml && serve deploy serve.yaml",
)
STATUS_EPILOG = examples("mlops status --ray-address 10.0.0.1:6379")
SCALE_EPILOG = examples("mlops scale support-helpdesk 3", "mlops scale support-helpdesk 1:8")
UNDEPLOY_EPILOG = examples("mlops undeploy support-helpdesk")

MAX_REPLICAS = 1000
INTERRUPTED = 130

_OPTIONS = {
    "BentoMLConfig.ray_address": "--ray-address",
    "BentoMLConfig.serving_backend": "--backend",
    "BentoMLConfig.host": "--host",
    "BentoMLConfig.port": "--port",
    "RayOptions.route_prefix": "--route-prefix",
    "RayOptions.model_source": "--model-source",
}

Address = Annotated[
    str | None,
    typer.Option(help="The cluster: auto (one that runs here), HOST:PORT, or local (start one)."),
]
Application = Annotated[str, typer.Argument(help="The application, as `mlops status` names it.")]
Timeout = Annotated[float, typer.Option(help="Seconds to wait until it answers.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


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
    as_json: AsJson = False,
) -> None:
    """Run a Bento on a Ray cluster, or update it there without losing a request."""
    with _naming_options():
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
        _print_serve_config(bento, settings, adapters, as_json)
        return
    from mlops.serving.ray import deploy as deploy_bento

    with _progress(f"deploying {bento}") as tell:
        deployed = deploy_bento(
            bento, settings, adapters=adapters, timeout_s=timeout, progress=tell
        )
    if as_json:
        console.print_json(_as_dict(deployed))
    else:
        _print_deployed(deployed)
    if deployed.is_local:
        typer.echo("The cluster is this command's own: Ctrl-C ends both.", err=as_json)
        _wait_for_signal(deployed.ray_address)
        _end(deployed.ray_address)


def status(
    ray_address: Address = None,
    as_json: AsJson = False,
) -> None:
    """List what is deployed on a Ray cluster."""
    from mlops.serving.ray import status as find_running

    applications = find_running(ray_address)
    if as_json:
        console.print_json([_status_row(one) for one in applications])
        return
    if not applications:
        console.print_note("nothing is deployed; `mlops deploy NAME` does that")
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("application", "project", "bento", "status", "replicas", "route"):
        table.add_column(heading, overflow="fold")
    for one in applications:
        project, route = "", ""
        if one.plan is not None:
            project, route = one.plan.config.project_name, one.plan.route_prefix
        cells = (one.name, project, one.tag, one.status, one.replica_states, route)
        table.add_row(*map(Text, cells))
    console.output().print(table)
    for one in applications:
        if one.message:
            from mlops.serving.ray.running import reason_of

            console.print_note(f"{one.name}: {reason_of(one.message)}")


def scale(
    application: Application,
    replicas: Annotated[str, typer.Argument(help="A number, or the fewest and the most: 1:4.")],
    ray_address: Address = None,
    timeout: Timeout = 600,
    as_json: AsJson = False,
) -> None:
    """Change how many replicas an application has."""
    from mlops.serving.ray import scale as scale_application

    low, high = parse_replicas(replicas)
    with _progress(f"scaling {application}") as tell:
        deployed = scale_application(
            application, (low, high), ray_address, timeout_s=timeout, progress=tell
        )
    if as_json:
        console.print_json(_as_dict(deployed))
        return
    answer = count(deployed.num_replicas, "replica answers", "replicas answer")
    typer.echo(f"{application}: {answer} at {deployed.url}")


def undeploy(
    application: Application,
    ray_address: Address = None,
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds to wait; by default until it is gone."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Take an application away, once it has answered what it is answering."""
    from mlops.serving.ray import undeploy as take_away

    with _progress(f"taking {application} away") as tell:
        take_away(application, ray_address, timeout_s=timeout, progress=tell)
    if as_json:
        console.print_json({"application": application, "status": "gone"})
    else:
        typer.echo(f"{application} is gone")


def parse_replicas(text: str) -> tuple[int, int]:
    """The fewest and the most of `2` or `1:4`.

    Raises:
        typer.BadParameter: the text is neither, or the numbers cannot be.
    """
    low, colon, high = text.partition(":")
    try:
        numbers = int(low), int(high if colon else low)
    except ValueError:
        numbers = 0, 0
    if not 1 <= numbers[0] <= numbers[1] <= MAX_REPLICAS:
        raise typer.BadParameter(
            f"{text!r} replicas are not allowed; use a number from 1 to {MAX_REPLICAS}, or the "
            "fewest and the most, such as 1:4"
        )
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


@contextmanager
def _naming_options() -> Iterator[None]:
    """Let an error about a field blame the option that sets it."""
    from mlops.errors import ConfigError

    try:
        yield
    except ConfigError as exc:
        field, found, rest = str(exc).partition(" = ")
        option = _OPTIONS.get(field)
        if not (found and option):
            raise
        raise ConfigError(f"{option} {rest.replace('; or None', '')}") from exc


def _adapters(given: list[str]) -> dict[str, str]:
    adapters = pairs(given, "--adapter", "NAME=TAG")
    for name, tag in adapters.items():
        if not tag:
            raise typer.BadParameter(f"--adapter {name}= names no tag")
    return adapters


def _print_serve_config(
    bento: str, settings: BentoMLConfig, adapters: dict[str, str], as_json: bool
) -> None:
    import yaml

    from mlops.serving.ray.deploy import with_adapters
    from mlops.serving.ray.deployment import Plan

    wanted = with_adapters(Plan.make(bento, settings), adapters).to_serve_config()
    if as_json:
        console.print_json(wanted)
    else:
        typer.echo(yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True))


def _print_deployed(deployed: Deployed) -> None:
    typer.echo(f"{deployed.bento_tag} answers at {deployed.url}")
    typer.echo(f"  application  {deployed.application}, {count(deployed.num_replicas, 'replica')}")
    typer.echo(f"  cluster      {deployed.ray_address}")
    if deployed.dashboard_url:
        typer.echo(f"  dashboard    {deployed.dashboard_url}")
    if deployed.log_folder:
        typer.echo(f"  logs         {deployed.log_folder}/serve")
    typer.echo(f'  ask          mlops predict "Hello" --url {deployed.url}')


def _as_dict(deployed: Deployed) -> dict[str, Any]:
    values = asdict(deployed)
    return {**values, "log_folder": values["log_folder"] and str(values["log_folder"])}


def _status_row(one: RunningApplication) -> dict[str, Any]:
    """Null is what Ray Serve does not tell, such as while an application is taken away."""
    plan = one.plan
    return {
        "application": one.name,
        "project": plan and plan.config.project_name,
        "bento_tag": plan and plan.tag,
        "digest": plan and plan.digest,
        "status": one.status,
        "message": one.message,
        "replicas": dict(one.replicas),
        "target_replicas": one.target,
        "route_prefix": plan and plan.route_prefix,
        "adapters": [*plan.adapters, *plan.added] if plan else [],
    }


@contextmanager
def _progress(title: str) -> Iterator[Any]:
    """A line that says how far it is; where nobody looks, one for each change.

    Ctrl-C leaves with what it has interrupted, and what goes on.
    """
    errors = console.errors()
    last = ""

    def tell_once(state: str) -> None:
        nonlocal last
        if state != last:
            last = state
            typer.echo(f"{title}: {state}", err=True)

    try:
        if not errors.is_terminal:
            yield tell_once
        else:
            with errors.status(title) as line:
                yield lambda state: line.update(f"{title}: {state}")
    except KeyboardInterrupt as exc:
        for note in getattr(exc, "__notes__", ["interrupted"]):
            typer.echo(note, err=True)
        raise typer.Exit(INTERRUPTED) from None


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


def _end(ray_address: str) -> None:
    """Let running requests of all applications end, and the cluster after them.

    Raises:
        DeploymentError: the cluster is gone already: a signal has reached all of its processes.
    """
    import ray

    from mlops.errors import DeploymentError
    from mlops.serving.ray import status as find_running
    from mlops.serving.ray import undeploy as take_away
    from mlops.serving.ray.cluster import check_listens

    typer.echo("ending: running requests are answered first", err=True)
    for one in find_running("local"):
        try:
            take_away(one.name, "local")
        except DeploymentError:
            check_listens(ray_address)  # it was taken away from elsewhere
    ray.shutdown()
