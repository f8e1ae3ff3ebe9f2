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
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from mlops.errors import DeploymentError, MissingDependencyError, MLOpsError
from mlops.hardware.home import expand
from mlops.serving.bentoml.config import BentoMLConfig
from mlops.serving.http.hosts import is_loopback
from mlops.serving.ray.running import DELETING, RunningApplication, reason_of, room_missing

AUTO = "auto"
LOCAL = "local"
LISTENS_S = 5.0
WATCH_S = 0.5
ASK_TRIES = 4

SERVING_ENVIRONMENT = {
    "RAY_worker_niceness": "0",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
}
"""For `ray start`. Replicas run with the priority of any other server: Ray's own choice, 15, lets
whatever else runs on the machine go first. A proxy that died is replaced after three failed checks,
which Ray itself makes every 10 s."""

_LOCAL_ENVIRONMENT = {**SERVING_ENVIRONMENT, "RAY_USAGE_STATS_ENABLED": "0"}
_SEVERAL_MACHINES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_CORE_LOG_LEVEL = "RAY_BACKEND_LOG_LEVEL"
_REPLICA = "SERVE_REPLICA::"
_REFUSALS = ("InvalidAuthToken", "couldn't find an authentication token")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Cluster:
    """A cluster that this process is connected to.

    Attributes:
        dashboard_url: None where it has none.
        log_folder: of this machine's part of it.
        is_local: it ends with this process.
        is_left: it is gone, or whoever waited for it does not wait any more.
    """

    address: str
    dashboard_url: str | None
    log_folder: Path | None
    is_local: bool
    is_left: threading.Event = field(default_factory=threading.Event)

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

    def applications(self) -> dict[str, RunningApplication]:
        """All applications of Ray Serve, by name; {} where it does not run.

        Raises:
            DeploymentError: the cluster is gone, or Ray Serve does not answer.
        """
        if self.is_left.is_set():  # else Ray would connect again, or start a cluster
            raise DeploymentError("this connection to the cluster has ended", "deploy")
        if not _serve_runs():
            return {}
        with translated(self.address):
            details = _client().get_serve_details()["applications"]
        found = {name: RunningApplication.read(name, one) for name, one in details.items()}
        if any(one.status == DELETING for one in found.values()):
            left = self._num_replicas_left()
            for name, one in found.items():
                if one.status == DELETING and left[name]:  # Ray Serve does not tell of these
                    found[name] = replace(one, replicas={"STOPPING": left[name]})
        return found

    def _num_replicas_left(self) -> Counter[str]:
        """Replicas whose actors exist, by application."""
        return Counter(_application_of(name) for name in self._replica_actors())

    def _replica_actors(self) -> list[str]:
        from ray.util import list_named_actors

        with translated(self.address):
            names = [str(one["name"]) for one in list_named_actors(all_namespaces=True)]
        return [name for name in names if name.startswith(_REPLICA)]

    def begin_delete(self, application: str) -> None:
        """Have an application taken away; `applications` shows when it is gone.

        Its replicas have their `timeout` for the requests that they are answering.
        """
        from ray import serve

        with translated(self.address):
            serve.delete(application, _blocking=False)

    def drop_unplaced(self, application: RunningApplication) -> None:
        """End replicas that no node has taken: Ray would wait for their requests to end.

        Not before Ray Serve has said that it wants them no more; it would start others.
        """
        self._kill(application.unplaced)

    def drop_unplaced_of_deleted(self, before: RunningApplication) -> None:
        """The same for an application that is being taken away; to be called until it is gone.

        Ray Serve says so before it stops to start others.

        Args:
            before: the application before that.
        """
        if before.status != DELETING:
            left = [name for name in self._replica_actors() if _application_of(name) == before.name]
            self._kill(name for name in left if name not in before.placed)

    def _kill(self, actors: Iterable[str]) -> None:
        import ray

        with translated(self.address):
            for name in actors:
                with contextlib.suppress(ValueError):  # it has ended by itself
                    ray.kill(ray.get_actor(name, namespace="serve"))

    def room_missing(self, application: RunningApplication) -> str:
        """Why replicas that no node has taken get no place; "" when all have one."""
        if not application.unplaced or self.address.startswith("ray://"):
            return ""
        import ray
        from ray._private.state import available_resources_per_node, total_resources_per_node
        from ray.autoscaler.v2.sdk import get_cluster_status

        with translated(self.address):
            waiting = get_cluster_status(self.address).resource_demands.ray_task_actor_demand
            bundles = [one.bundle for kind in waiting for one in kind.bundles_by_count]
            if application.needs not in bundles:  # a node has taken it, and starts its process
                return ""
            names = {one["NodeID"]: one["NodeManagerAddress"] for one in ray.nodes()}
            free, total = available_resources_per_node(), total_resources_per_node()
        total = {node: has for node, has in total.items() if node in names}
        labels = {node: f"{names[node]} ({node[:6]})" for node in total}
        return room_missing(
            application.needs,
            {labels[node]: free.get(node, {}) for node in total},
            {labels[node]: has for node, has in total.items()},
        )

    def watched(self, work: Callable[[], Result]) -> Result:
        """Do what waits for the cluster; ends at once when that is gone.

        Ray itself would log for a minute, and then end the process. So the work has a thread.

        Raises:
            DeploymentError: the cluster is gone, or what the work raised.
        """
        outcome: Future[Result] = Future()

        def run() -> None:
            try:
                outcome.set_result(work())
            except BaseException as exc:
                outcome.set_exception(exc)

        threading.Thread(target=run, daemon=True).start()
        try:
            while not wait([outcome], WATCH_S).done:
                if ":" in self.address:  # else a caller has connected, and Ray does not tell where
                    check_listens(self.address)
        except BaseException:
            self.is_left.set()
            raise
        return outcome.result()


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
        # A cluster that is left in the middle may be gone: Ray would wait for it.
        if not was_connected and not cluster.is_local and not cluster.is_left.is_set():
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

    known = os.environ.get("RAY_ADDRESS", address) if address == AUTO else address
    if not ray.is_initialized():
        known = _known_address(address)
        if known == LOCAL or _is_loopback(known):
            _use_loopback()
        if ":" in known:
            check_answers(known, address)
    logging.getLogger("ray.serve").addFilter(_is_warning)  # it tells each step
    is_local = address == LOCAL
    if is_local:
        for name, value in _LOCAL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    try:
        with contextlib.nullcontext() if is_local else _quiet_core():
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
        info.get("address") or known,  # a client of `ray://` is not told
        f"http://{url}" if url else None,
        Path(session, "logs") if session else None,
        is_local,
    )


@contextlib.contextmanager
def _quiet_core() -> Iterator[None]:
    """Keep what Ray's core logs off this process's stderr; we say it when the cluster is gone.

    Not for a cluster that is started here: its processes would log nothing either.
    """
    was_set = _CORE_LOG_LEVEL in os.environ
    os.environ.setdefault(_CORE_LOG_LEVEL, "fatal")
    try:
        yield
    finally:
        if not was_set:
            del os.environ[_CORE_LOG_LEVEL]


def _known_address(address: str) -> str:
    """Where "auto" leads, as far as this machine knows: the variable, else the cluster here.

    Raises:
        DeploymentError: there are several here.
    """
    if address != AUTO:
        return address
    if named := os.environ.get("RAY_ADDRESS"):
        return named
    from ray._common.utils import get_ray_address_file
    from ray._private.services import find_gcs_addresses

    with contextlib.suppress(OSError):
        return Path(get_ray_address_file(None)).read_text(encoding="utf-8").strip()
    find_gcs_addresses.cache_clear()
    running = sorted(find_gcs_addresses())  # other programs', such as `mlops deploy`
    if len(running) > 1:
        raise DeploymentError(
            f"several Ray clusters run here: choose one with --ray-address, {' or '.join(running)}",
            "connect",
        )
    return running[0] if running else AUTO


def _is_loopback(address: str) -> bool:
    host = address.removeprefix("ray://").rpartition(":")[0].strip("[]")
    return host == "localhost" or is_loopback(host)


def _use_loopback() -> None:
    """Let Ray take 127.0.0.1 for what it is, and let a cluster that it starts listen there alone.

    On Linux it takes this machine's outer address instead, unless it is told, before it is
    imported, that there are no clusters of several machines. On macOS that is its default.
    """
    from ray._private import ray_constants

    if os.environ.setdefault(_SEVERAL_MACHINES, "0") == "0":
        ray_constants.ENABLE_RAY_CLUSTER = False


def check_answers(address: str, asked_for: str | None = None) -> None:
    """See that a cluster answers, and takes this user's token; Ray itself tries for minutes.

    Args:
        address: `HOST:PORT` or `ray://HOST:PORT`.
        asked_for: the address by the user's name for it.

    Raises:
        DeploymentError: it does not.
    """
    check_listens(address, asked_for)
    if address.startswith("ray://"):
        return
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.gcs_service_pb2 import CheckAliveReply, CheckAliveRequest
    from ray.exceptions import AuthenticationError

    try:
        with init_grpc_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            ask = channel.unary_unary(
                "/ray.rpc.NodeInfoGcsService/CheckAlive",
                request_serializer=CheckAliveRequest.SerializeToString,
                response_deserializer=CheckAliveReply.FromString,
            )
            ask(CheckAliveRequest(), timeout=LISTENS_S)
    except (grpc.RpcError, AuthenticationError) as exc:
        reason = exc.details() if isinstance(exc, grpc.Call) else str(exc)
        raise _no_cluster(asked_for or address, ConnectionError(reason)) from exc


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
    is_refused = any(one in f"{exc} {exc.__cause__}" for one in _REFUSALS)
    if address == AUTO and isinstance(exc, OSError) and not is_refused:
        message = (
            "no Ray cluster runs here: start one with `ray start --head`, name another with "
            "--ray-address HOST:PORT, or start one for this deployment with --ray-address local"
        )
    elif address == LOCAL:
        message = f"Ray could not be started here: {_first_line(exc)}"
    elif is_refused:
        message = (
            f"the Ray cluster at {address} wants another token than this user has, or one at all: "
            "copy ~/.ray/auth_token from its head node, or set RAY_AUTH_TOKEN"
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
        details = {"ray_address": address}
        try:
            check_listens(address)
        except DeploymentError:
            message = f"the Ray cluster at {address} is gone: {reason_of(str(exc))}"
            raise DeploymentError(message, "deploy", details) from exc
        raise DeploymentError(
            f"the Ray cluster at {address} runs, but Ray Serve does not answer on it: "
            f"{reason_of(str(exc))}; try again, `mlops status` shows what runs",
            "deploy",
            details,
        ) from exc


def _application_of(replica_actor: str) -> str:
    return replica_actor.removeprefix(_REPLICA).partition("#")[0]


def serve_url() -> str:
    """Where Serve's proxies answer, seen from this machine."""
    config = _client().http_config
    host = config.host if config.host not in {None, "0.0.0.0", "::"} else "127.0.0.1"  # noqa: S104
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


def serve_host() -> str:
    """The address that Serve's proxies listen on."""
    return str(_client().http_config.host or "127.0.0.1")


def _client() -> Any:
    from ray.serve.context import _get_global_client

    return _get_global_client()


def _serve_runs() -> bool:
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False) is not None


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


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
