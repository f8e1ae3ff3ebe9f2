"""`bentoml serve` with `--workers`, and `bentoml logs`; loaded by BentoML's command line.

`serve` is BentoML's own command. Around it: `--workers`, 127.0.0.1 as the address where nothing
else is asked for, an end with a clear message when a model cannot be loaded, and a `--reload` that
follows the code and the model.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
from collections.abc import Callable
from typing import Any

import click
from bentoml_cli.serve import serve_command
from bentoml_cli.utils import BentoMLCommandGroup

from mlops.errors import ConfigError, MLOpsError
from mlops.hardware.blas import THREAD_VARIABLES

LOCAL_HOST = "127.0.0.1"
_ADDRESS_ERRORS = (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL)
_OVERRIDES = "BENTOML_CONFIG_OVERRIDES"


def _with_workers(original: click.Command) -> click.Command:
    """A copy of BentoML's `serve`; BentoML adds its common options and wrappers to it again."""
    command = copy.copy(original)
    command.params = [
        *original.params[: -BentoMLCommandGroup.NUMBER_OF_COMMON_PARAMS],
        click.Option(
            ["--workers"],
            type=click.IntRange(1, 256),
            help="Number of worker processes; each loads its own copy of the model.",
        ),
    ]
    bare: Any = original.callback
    for _ in ("click errors", "usage tracking"):
        bare = bare.__wrapped__
    command.callback = _around(bare)
    return command


def _around(run: Callable[..., None]) -> Callable[..., None]:
    def serve(workers: int | None, **options: Any) -> None:
        from mlops.registry import ModelStore
        from mlops.serving.bentoml import logs
        from mlops.serving.bentoml.reloading import reloading
        from mlops.serving.bentoml.serve_options import ServeOptions
        from mlops.serving.bentoml.shutdown import signals_watched
        from mlops.serving.bentoml.sources import load_service, load_with_sources
        from mlops.serving.bentoml.supervision import supervised

        try:
            ModelStore()  # BentoML would end with a traceback where it cannot be opened
            users_own = _chosen_threads()
            # Imported here first so that a mistake in it is told at once.
            target, sources = (options["bento"], options["working_dir"]), None
            if options["reload"]:
                service, sources = load_with_sources(*target)
            else:
                service = load_service(*target)
            options["reload"] = False  # BentoML's own would watch every file of the folder
            ServeOptions.given().check_honoured(service)
            if workers is not None:
                _override(service.name, {"workers": workers})
            options["host"] = options["host"] or _default_host(service)
            _check_keys(service, options["host"])
            workers = workers or _configured_workers(service)
            _check_workers(service, workers)
            ours = _ours(service)
            environment = _thread_environment(service, workers, users_own)
            with (
                logs.of_command(service) if ours else contextlib.nullcontext(),
                supervised(workers, environment, ours) as deaths,
                signals_watched(deaths.on_death) as ending,
                reloading(*target, sources, ending) if sources else contextlib.nullcontext(),
            ):
                run(**options)
        except MLOpsError as exc:
            raise click.ClickException(str(exc)) from exc
        except OSError as exc:
            if exc.filename is not None or exc.errno not in _ADDRESS_ERRORS:
                raise
            from bentoml._internal.configuration.containers import BentoMLContainer

            if exc.errno == errno.EADDRNOTAVAIL:
                raise click.ClickException(
                    f"{options['host']} is no address of this machine: choose another with --host"
                ) from exc
            port = options["port"] or BentoMLContainer.http.port.get()
            raise click.ClickException(
                f"port {port} cannot be listened on ({exc.strerror}): choose another with --port"
            ) from exc

    return serve


def _ours(service: Any) -> set[str]:
    """circus's names of those services, of a composition, that are made by this toolkit."""
    services = service.all_services(exclude_urls=True).values()
    return {
        "service" if one is service else f"service_{one.name}"
        for one in services
        if hasattr(one, "served_model")
    }


def _override(service_name: str, settings: dict[str, Any]) -> None:
    """Settings that win over the service's own, here and in the workers."""
    overrides = json.loads(os.environ.get(_OVERRIDES) or "{}")
    services = overrides.setdefault("services", {})
    services[service_name] = {**services.get(service_name, {}), **settings}
    os.environ[_OVERRIDES] = json.dumps(overrides)


def _chosen_threads() -> set[str]:
    return {name for name in THREAD_VARIABLES if os.environ.get(name)}


def _configured_workers(service: Any) -> int:
    configured = getattr(service, "config", {}).get("workers", 1)
    if isinstance(configured, int):
        return configured
    from mlops.hardware import detect

    return detect().cores  # BentoML's "cpu_count"


def _check_workers(service: Any, workers: int) -> None:
    """Hold the command line to what the configuration would be held to.

    Raises:
        ConfigError: adapters at run time, and several workers.
    """
    http_options = getattr(service, "http_options", None)
    if workers > 1 and http_options is not None and http_options.enable_runtime_adapters:
        raise ConfigError(
            f"--workers must be 1 with http.enable_runtime_adapters, not {workers}: a request "
            "reaches one worker, and the others would not know the adapter"
        )


def _thread_environment(service: Any, workers: int, users_own: set[str]) -> dict[str, str]:
    """Each worker's share of the cores as its BLAS threads, where nobody has chosen them.

    Args:
        users_own: the thread variables that were set before the service was imported; an import of
            MLX sets one for a process that has the machine to itself.
    """
    from mlops.hardware import detect

    if "OPENBLAS_NUM_THREADS" not in users_own:
        os.environ.pop("OPENBLAS_NUM_THREADS", None)
    chosen = _chosen_threads() | {variable.name for variable in getattr(service, "envs", [])}
    if workers == 1 or chosen & set(THREAD_VARIABLES):
        return {}
    return {"OPENBLAS_NUM_THREADS": str(max(1, detect().performance_cores // workers))}


def _default_host(service: Any) -> str | None:
    """The address to listen on where none was given; None leaves it to BentoML's configuration."""
    from bentoml.serving import running_inside_container

    if running_inside_container():
        return "0.0.0.0"  # noqa: S104 - the container's border is the container's network
    configured = "http" in getattr(service, "config", {}) or "BENTOML_CONFIG" in os.environ
    return None if configured else LOCAL_HOST


def _check_keys(service: Any, host: str | None) -> None:
    """Read the API keys, so that a mistake is told at once; warn where all others may ask.

    In a container too: its network may be the whole world's.

    Raises:
        ConfigError: the keys cannot be read.
    """
    if (http := getattr(service, "http_options", None)) is None or http.to_settings().api_keys:
        return
    if host is None:
        from bentoml._internal.configuration.containers import BentoMLContainer

        service.inject_config()
        host = str(BentoMLContainer.http.host.get())
    from mlops.serving.http.hosts import is_loopback

    if not is_loopback(host):
        click.echo(
            f"Warning: whoever reaches this machine may use the service, because it listens on "
            f"{host} and has no API keys: set MLOPS_API_KEYS or http.api_key_file, or serve with "
            f"--host {LOCAL_HOST}.",
            err=True,
        )


serve = _with_workers(serve_command.commands["serve"])


@click.command()
@click.argument("service", metavar="NAME[:VERSION]")
@click.option("-n", "--lines", type=click.IntRange(min=0), help="Only so many of the last lines.")
@click.option("-f", "--follow", is_flag=True, help="Go on with new lines until interrupted.")
def logs(service: str, lines: int | None, follow: bool) -> None:
    """Print the log of a service that was served on this machine.

    \b
    e.g.:
        bentoml logs my_service
        bentoml logs my_service:1.0.0 -n 50
        bentoml logs my_service --follow
    """
    from mlops.serving.bentoml import logs as service_logs

    try:
        news = service_logs.follow(service) if follow else iter(())
        for line in service_logs.read(service, lines):
            click.echo(line)
        for line in news:
            click.echo(line)
    except MLOpsError as exc:
        raise click.ClickException(str(exc)) from exc
    except KeyboardInterrupt:
        pass
