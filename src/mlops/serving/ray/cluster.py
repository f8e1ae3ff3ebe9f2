"""The way to a Ray cluster and to Ray Serve on it, with Ray's errors in our words.

    "auto"               the cluster that this machine is a part of
    "local"              one of this process's own, which ends with it
    "HOST:PORT", "ray://HOST:PORT"

What Ray Serve does not offer publicly is asked for here, but for a deployment's version
(`application`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlops.errors import DeploymentError, MissingDependencyError, MLOpsError
from mlops.hardware.home import expand
from mlops.serving.bentoml.config import BentoMLConfig
from mlops.serving.ray.deployment import Plan

AUTO = "auto"
LOCAL = "local"
LISTENS_S = 5.0
ASK_TRIES = 4

SERVING_ENVIRONMENT = {"RAY_worker_niceness": "0"}
"""For `ray start`: replicas run with the priority of any other server. Ray's own choice, 15, lets
whatever else runs on the machine go first."""

_LOCAL_ENVIRONMENT = {**SERVING_ENVIRONMENT, "RAY_USAGE_STATS_ENABLED": "0"}
_MAX_REASON = 2000


@dataclass(frozen=True)
class Cluster:
    """A cluster that this process is connected to.

    Attributes:
        dashboard_url: None where it has none.
        log_folder: of this machine's part of it.
        is_local: it ends with this process.
    """

    address: str
    dashboard_url: str | None
    log_folder: Path | None
    is_local: bool

    @property
    def num_gpus(self) -> float:
        """NVIDIA's and Apple's, of all nodes."""
        import ray

        return float(ray.cluster_resources().get("GPU", 0))

    def start_serve(self, config: BentoMLConfig) -> None:
        """Start Ray Serve unless it runs.

        Raises:
            DeploymentError: it runs, and listens elsewhere than was asked for.
        """
        from ray import serve

        if not _serve_runs():
            host = "127.0.0.1" if config.host == "localhost" else config.host
            http = {"host": host, "port": config.port}
            self.ask(lambda: serve.start(proxy_location="EveryNode", http_options=http))
        elif (asked := {"host", "port"} & set(config.changes())) and any(
            getattr(_client().http_config, name) != getattr(config, name) for name in asked
        ):
            raise DeploymentError(
                f"Ray Serve runs on this cluster already, and listens at {serve_url()}: leave "
                "host and port out, or stop it with `serve shutdown`",
                "deploy",
            )

    def ask(self, work: Callable[[], object]) -> None:
        """Let Ray Serve do something that may be done twice.

        It waits for its proxies then, and fails when one of them is just being taken away.

        Raises:
            DeploymentError: Ray Serve refused, or the cluster is gone.
        """
        from ray.exceptions import RayActorError

        for number in range(ASK_TRIES):
            try:
                with translated(self.address):
                    work()
            except DeploymentError as exc:
                if number == ASK_TRIES - 1 or not isinstance(exc.__cause__, RayActorError):
                    raise
                time.sleep(1)
            else:
                return

    def forget_file(self, application: str) -> None:
        """Take an application out of what `serve deploy` or KubeRay asked for, if it is in there.

        Ray Serve asks for all of that again whenever its controller starts anew, also for what has
        been taken away since. An application that runs because of it ends.
        """
        import ray
        from ray.serve.schema import ServeDeploySchema

        with translated(self.address):
            client = _client()
            wanted = ray.get(client._controller.get_app_configs.remote())
            if application in wanted:
                del wanted[application]
                capacity = client.get_serve_details().get("target_capacity")
                client.deploy_apps(
                    ServeDeploySchema(applications=list(wanted.values()), target_capacity=capacity)
                )

    def running(self) -> dict[str, RunningApplication]:
        """The Serve applications of this toolkit, by name; {} where Serve does not run."""
        if not _serve_runs():
            return {}
        with translated(self.address):
            details = _client().get_serve_details()["applications"]
        found = (RunningApplication.read(name, one) for name, one in details.items())
        return {one.name: one for one in found if one is not None}


@dataclass(frozen=True)
class RunningApplication:
    """A Serve application of this toolkit's, as the cluster tells of it.

    Attributes:
        status: Ray Serve's: RUNNING, DEPLOYING, DEPLOY_FAILED, UNHEALTHY, DELETING, …
        message: Ray Serve's, of the application or of its deployment; "" when all is well.
        replicas: how many there are, by Ray Serve's name for their state.
        target: how many there are to be.
        is_from_file: `serve deploy` or KubeRay asked for it.
    """

    name: str
    plan: Plan
    status: str
    message: str
    replicas: Mapping[str, int]
    target: int
    is_from_file: bool

    @classmethod
    def read(cls, name: str, details: Mapping[str, Any]) -> RunningApplication | None:
        """What Ray Serve tells of an application; None when it is none of this toolkit's."""
        for one in (details.get("deployments") or {}).values():
            user_config = one["deployment_config"].get("user_config") or {}
            if not isinstance(user_config, Mapping) or "plan" not in user_config:
                continue
            try:
                plan = Plan.from_dict(user_config["plan"])
            except DeploymentError:
                continue
            states: dict[str, int] = {}
            for replica in one["replicas"]:
                state = _text(replica["state"])
                states[state] = states.get(state, 0) + 1
            return cls(
                name,
                plan,
                _text(details["status"]),
                one.get("message") or details.get("message") or "",
                states,
                one.get("target_num_replicas") or 0,
                _text(details.get("source")) == "declarative",
            )
        return None

    @property
    def num_running(self) -> int:
        """Replicas that answer."""
        return self.replicas.get("RUNNING", 0)


@contextlib.contextmanager
def connected(address: str | None = None) -> Iterator[Cluster]:
    """A connection to a cluster; one that the caller has made before is used as it is.

    Raises:
        DeploymentError: there is no such cluster.
        MissingDependencyError: Ray is not installed.
    """
    use_token()
    try:
        import ray
    except ImportError as exc:
        raise MissingDependencyError("ray", "ray") from exc
    address = address or AUTO
    was_connected = ray.is_initialized()
    cluster = _connect(address)
    try:
        yield cluster
    finally:
        if not was_connected and not cluster.is_local:
            ray.shutdown()


def is_connected() -> bool:
    """Whether this process is connected to a cluster."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def use_token() -> None:
    """Let this process show the user's token to clusters, if there is one.

    Clusters ask for it where one is found when they start, but Ray shows it only when told to, and
    looks at that when it is first imported.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)
    if named or (expand("~/.ray/auth_token")).is_file():
        os.environ["RAY_AUTH_MODE"] = "token"


def _connect(address: str) -> Cluster:
    import ray

    if not ray.is_initialized() and ":" in (known := _known_address(address)):
        check_listens(known, address)  # Ray itself tries for minutes
    logging.getLogger("ray.serve").addFilter(_is_warning)  # it tells each step
    is_local = address == LOCAL
    if is_local:
        for name, value in _LOCAL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    try:
        context = ray.init(
            address=address,
            ignore_reinit_error=True,
            log_to_driver=False,
            logging_level="error",
            configure_logging=False,
        )
    except Exception as exc:  # of many kinds; a bare one when Ray takes too long to start
        raise _no_cluster(address, exc) from exc
    info = getattr(context, "address_info", {})
    session = info.get("session_dir")
    url = getattr(context, "dashboard_url", None) or info.get("webui_url")
    return Cluster(
        info.get("address") or address,
        f"http://{url}" if url else None,
        Path(session, "logs") if session else None,
        is_local,
    )


def _known_address(address: str) -> str:
    """Where "auto" leads, as far as this machine knows: the variable, else the cluster here."""
    if address != AUTO:
        return address
    if named := os.environ.get("RAY_ADDRESS"):
        return named
    with contextlib.suppress(OSError):
        return Path(tempfile.gettempdir(), "ray", "ray_current_cluster").read_text().strip()
    return AUTO


def check_listens(address: str, asked_for: str | None = None) -> None:
    """See that somebody listens at `HOST:PORT` or `ray://HOST:PORT`.

    Args:
        asked_for: the address by the user's name for it.

    Raises:
        DeploymentError: nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), LISTENS_S).close()
    except (OSError, ValueError) as exc:
        raise _no_cluster(asked_for or address, exc) from exc


def _no_cluster(address: str, exc: Exception) -> DeploymentError:
    details = {"ray_address": address}
    is_refused = "InvalidAuthToken" in f"{exc} {exc.__cause__}"
    if address == AUTO and isinstance(exc, OSError) and not is_refused:
        message = (
            "no Ray cluster runs here: start one with `ray start --head`, name another with "
            "--ray-address HOST:PORT, or start one for this deployment with --ray-address local"
        )
    elif address == LOCAL:
        message = f"Ray could not be started here: {_first_line(exc)}"
    elif is_refused:
        message = (
            f"the Ray cluster at {address} refuses this user's token: copy ~/.ray/auth_token from "
            "its head node, or set RAY_AUTH_TOKEN"
        )
    elif isinstance(exc, OSError):
        message = f"no Ray cluster answers at {address}: {_first_line(exc)}"
    else:
        message = f"the Ray cluster {address!r} cannot be used: {_first_line(exc)}"
    return DeploymentError(message, "connect", details)


@contextlib.contextmanager
def translated(address: str) -> Iterator[None]:
    """Raise Ray's errors as ours.

    Raises:
        DeploymentError: what Ray said, or that the cluster is gone.
    """
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        yield
    except MLOpsError:
        raise
    except (RayServeException, ValueError) as exc:
        raise DeploymentError(f"Ray Serve refused: {reason_of(str(exc))}", "deploy") from exc
    except (RayError, ConnectionError, RuntimeError, TimeoutError) as exc:
        raise DeploymentError(
            f"the Ray cluster at {address} is gone, or does not answer: {reason_of(str(exc))}",
            "deploy",
            {"ray_address": address},
        ) from exc


def reason_of(text: str) -> str:
    """The last error in a traceback that Ray tells, as one sentence; else the text's last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        name, colon, rest = line.partition(": ")
        if colon and name.rpartition(".")[2].endswith(("Error", "Exception")) and " " not in name:
            is_ours = name.startswith("mlops.")
            return (rest if is_ours else f"{name.rpartition('.')[2]}: {rest}")[:_MAX_REASON]
    return (lines[-1] if lines else "no reason was given")[:_MAX_REASON]


def serve_url() -> str:
    """Where Serve's proxies answer, seen from this machine."""
    config = _client().http_config
    host = config.host if config.host not in {None, "0.0.0.0", "::"} else "127.0.0.1"  # noqa: S104
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


def _client() -> Any:
    from ray.serve.context import _get_global_client

    return _get_global_client()


def _serve_runs() -> bool:
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False) is not None


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def _text(value: Any) -> str:
    """The text of what Ray tells as an enumeration."""
    return str(getattr(value, "value", value))


def check_port(host: str, port: int) -> None:
    """See that a cluster that is to be started here can listen for clients.

    Raises:
        DeploymentError: the port is taken.
    """
    host = "127.0.0.1" if host == "localhost" else host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as exc:
            raise DeploymentError(
                f"port {port} cannot be listened on ({exc.strerror}): choose another with --port",
                "deploy",
                {"port": port},
            ) from exc


def _first_line(exc: BaseException) -> str:
    text = str(exc).strip()
    return text.splitlines()[0][:300] if text else type(exc).__name__
