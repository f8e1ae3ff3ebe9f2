"""The `mlops` command: parse, call, print. What it does lives in the packages below.

Each command is a function in a module of its own, registered with one line below. Those modules
import only the standard library and Typer at their top, so that `mlops --help` is instant.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Annotated

import typer

from mlops import __version__
from mlops.cli import console
from mlops.cli.arguments import HELP_OPTIONS
from mlops.cli.chat import EPILOG as CHAT_EPILOG
from mlops.cli.chat import chat
from mlops.cli.demo import EPILOG as DEMO_EPILOG
from mlops.cli.demo import demo
from mlops.cli.deploy import (
    DEPLOY_EPILOG,
    SCALE_EPILOG,
    STATUS_EPILOG,
    UNDEPLOY_EPILOG,
    deploy,
    scale,
    status,
    undeploy,
)
from mlops.cli.doctor import EPILOG as DOCTOR_EPILOG
from mlops.cli.doctor import doctor
from mlops.cli.gc import EPILOG as GC_EPILOG
from mlops.cli.gc import gc
from mlops.cli.logs import EPILOG as LOGS_EPILOG
from mlops.cli.logs import logs
from mlops.cli.models import models
from mlops.cli.package import EPILOG as PACKAGE_EPILOG
from mlops.cli.package import package
from mlops.cli.predict import EPILOG as PREDICT_EPILOG
from mlops.cli.predict import predict
from mlops.cli.push import EPILOG as PUSH_EPILOG
from mlops.cli.push import push
from mlops.cli.run import EPILOG as RUN_EPILOG
from mlops.cli.run import run
from mlops.cli.serve import EPILOG as SERVE_EPILOG
from mlops.cli.serve import serve
from mlops.cli.wording import at_the_command_line
from mlops.errors import MLOpsError

DEBUG_VARIABLE = "MLOPS_DEBUG"

# Typer's rich help would take longer to import than all the rest.
app = typer.Typer(
    name="mlops",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=HELP_OPTIONS,
)

app.command(epilog=DEMO_EPILOG)(demo)
app.command(epilog=PACKAGE_EPILOG)(package)
app.command(epilog=SERVE_EPILOG)(serve)
app.command(epilog=PREDICT_EPILOG)(predict)
app.command(epilog=CHAT_EPILOG)(chat)
app.command(epilog=LOGS_EPILOG)(logs)
app.add_typer(models, name="models")
app.command(epilog=GC_EPILOG)(gc)
app.command(epilog=PUSH_EPILOG)(push)
app.command(epilog=DEPLOY_EPILOG)(deploy)
app.command(epilog=STATUS_EPILOG)(status)
app.command(epilog=SCALE_EPILOG)(scale)
app.command(epilog=UNDEPLOY_EPILOG)(undeploy)
app.command(epilog=DOCTOR_EPILOG)(doctor)
# What follows COMMAND, --help included, belongs to it.
app.command(
    epilog=RUN_EPILOG,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)(run)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mlops {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help=f"Show the traceback of an error ({DEBUG_VARIABLE}=1).")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Take a trained model to a verified, versioned BentoML package, and serve it fast on MLX."""
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"  # for the processes that a command starts, too


def main() -> None:
    """Run the command line. An error raised on purpose is one red sentence and exit status 1."""
    # A shell that closes them (`>&-`) leaves none.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, PTH123 - for the process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115, PTH123
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what it has no letters for, it shows as ?
            stream.reconfigure(errors="replace")
    try:
        app(prog_name="mlops", terminal_width=console.width())
    except MLOpsError as error:
        if os.environ.get(DEBUG_VARIABLE, "0") not in {"", "0"}:
            raise
        console.print_error(at_the_command_line(str(error)))
        sys.exit(1)
    except OSError as error:
        if error.filename is not None or error.errno not in {errno.ENOSPC, errno.EIO}:
            raise
        console.print_error(f"the output cannot be written: {error.strerror}")
        os._exit(1)  # what is still to be written would fail again
