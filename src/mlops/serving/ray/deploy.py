"""`deploy`, `status`, `scale` and `undeploy`: services on a Ray cluster.

    deploy    Bento + configuration -> plan -> Ray Serve -> wait until it answers, or say why not

An update starts replicas of the new version before it stops the old ones. When they cannot start,
the deployment goes back to what it was: the old replicas are still there.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlops.counts import count
from mlops.errors import ConfigError, DeploymentError
from mlops.registry import ModelStore, shared
from mlops.serving.bentoml.config import BentoMLConfig
from mlops.serving.ray.cluster import (
    LOCAL,
    Cluster,
    check_port,
    connected,
    is_connected,
    serve_url,
    translated,
)
from mlops.serving.ray.deployment import Plan
from mlops.serving.ray.running import DELETING, RunningApplication, reason_of

TIMEOUT_S = 600.0
POLL_S = 0.25
SETTLED_S = 5.0
"""After that Ray Serve tells of what it was told last."""
UNHEALTHY_S = 20.0
PLACED_S = 3.0
_OPERATION = "deploy"

Progress = Callable[[str], None]
"""Told in a few words how far it is, often."""


@dataclass(frozen=True)
class Deployed:
    """A service that answers on a cluster.

    Attributes:
        url: of the service, without the route.
        ray_address: of the cluster, `HOST:PORT`.
        dashboard_url, log_folder: Ray's; None where it has none, or not on this machine.
        is_local: the cluster was started here, and ends with this process.
    """

    application: str
    bento_tag: str
    url: str
    num_replicas: int
    ray_address: str
    dashboard_url: str | None
    log_folder: Path | None
    is_local: bool


def deploy(
    bento_tag: str,
    config: BentoMLConfig | Mapping[str, Any] | None = None,
    *,
    adapters: Mapping[str, str] | None = None,
    timeout_s: float = TIMEOUT_S,
    progress: Progress | None = None,
) -> Deployed:
    """Run a Bento on Ray Serve, or update what runs under its name, and wait until it answers.

    Args:
        bento_tag: `name:version`; with the backend `ray_serve` also the tag of a stored model.
        config: says where and how; see `Plan.make`. Its `serving_backend` is `hybrid` or
            `ray_serve`, its `ray_address` by default "auto". A cluster that "local" starts ends
            with this process.
        adapters: further adapters by the name that requests use: tags of the model store. Replicas
            that run take them over without a restart.
        timeout_s: how long to wait.

    Raises:
        ConfigError: the backend is not Ray Serve, or a setting holds what it may not.
        DeploymentError: there is no cluster, or the service does not start; says why.
        BentoMLError: there is no such Bento, or it is damaged.
    """
    plan = with_adapters(Plan.make(bento_tag, config), adapters or {})
    tell = progress or (lambda _: None)
    if plan.config.ray_address == LOCAL and not is_connected():
        check_port(plan.config.host, plan.config.port)
        tell("starting Ray")
    with connected(plan.config.ray_address) as cluster:
        before = cluster.watched(lambda: _prepare(plan, cluster, tell))
        return _run(plan, before, cluster, timeout_s, tell)


def _prepare(plan: Plan, cluster: Cluster, tell: Progress) -> RunningApplication | None:
    """All that comes before Ray Serve is told; returns what runs under the plan's name."""
    _find_before(plan, cluster)
    share(plan, tell)  # may take minutes
    cluster.start_serve(plan.config)
    cluster.forget_file(plan.application)
    before = _find_before(plan, cluster)
    if before is not None and before.plan is not None and before.plan.version == plan.version:
        _check_adapters(plan, cluster)
    return before


def _find_before(plan: Plan, cluster: Cluster) -> RunningApplication | None:
    """What runs under the plan's name, if it may be replaced."""
    before = cluster.applications().get(plan.application)
    if before is not None:
        _check_same_service(plan, before)
        _check_not_from_file(before)
    return before


def status(ray_address: str | None = None) -> list[RunningApplication]:
    """All applications of Ray Serve on a cluster, others' among them, in whatever state.

    Raises:
        DeploymentError: there is no cluster.
    """
    with connected(ray_address) as cluster:
        return cluster.watched(lambda: list(cluster.applications().values()))


def scale(
    application: str,
    replicas: int | tuple[int, int],
    ray_address: str | None = None,
    *,
    timeout_s: float = TIMEOUT_S,
    progress: Progress | None = None,
) -> Deployed:
    """Change how many replicas an application has, without a restart.

    Args:
        replicas: a number, or the fewest and the most, between which Ray chooses by the load.

    Raises:
        ConfigError: the numbers cannot be.
        DeploymentError: there is no such application, or the replicas do not start.
    """
    low, high = (replicas, replicas) if isinstance(replicas, int) else replicas
    with connected(ray_address) as cluster:
        before = cluster.watched(lambda: _find(application, cluster))
        _check_not_from_file(before)
        if before.plan is None:
            raise DeploymentError(
                f"the application {application!r} is {before.status}: it cannot be scaled now",
                _OPERATION,
                {"application": application},
            )
        plan = before.plan.with_config(ray_min_replicas=low, ray_max_replicas=high)
        if plan.config.http.enable_runtime_adapters and high > 1:
            raise ConfigError("http.enable_runtime_adapters needs one replica; this asks for more")
        return _run(plan, before, cluster, timeout_s, progress or (lambda _: None))


def undeploy(
    application: str,
    ray_address: str | None = None,
    *,
    timeout_s: float | None = None,
    progress: Progress | None = None,
) -> None:
    """Take an application away, and wait until what it is answering is answered.

    Args:
        timeout_s: how long to wait; by default until it is gone. Ray Serve ends requests that take
            longer than the service's `timeout`.

    Raises:
        DeploymentError: there is no such application, or it is not gone in time.
    """
    with connected(ray_address) as cluster:

        def take_away() -> None:
            found = _find(application, cluster)
            cluster.forget_file(application)
            cluster.begin_delete(application)
            _wait_until_gone(found, cluster, timeout_s, progress or (lambda _: None))

        try:
            cluster.watched(take_away)
        except KeyboardInterrupt as exc:
            exc.add_note(
                f"interrupted: if {application} was there, it goes on ending; `mlops status` shows "
                "how far it is"
            )
            raise


def _wait_until_gone(
    found: RunningApplication, cluster: Cluster, timeout_s: float | None, tell: Progress
) -> None:
    application = found.name
    began_s = time.monotonic()
    is_deleting = False
    while (now := cluster.applications().get(application)) is not None:
        if is_deleting and now.status != DELETING:
            raise DeploymentError(
                f"the application {application!r} was deployed again while it was taken away",
                _OPERATION,
                {"application": application},
            )
        if now.status == DELETING:
            is_deleting = True
            cluster.drop_unplaced_of_deleted(found)
        left = count(sum(now.replicas.values()), "replica")
        if timeout_s is not None and time.monotonic() - began_s > timeout_s:
            raise DeploymentError(
                f"the application {application!r} is not gone after {timeout_s:g} s: {left} to "
                "end. It goes on ending: `mlops status` shows how far it is",
                _OPERATION,
                {"application": application},
            )
        tell(f"{left} to end")
        time.sleep(POLL_S)


def with_adapters(plan: Plan, adapters: Mapping[str, str]) -> Plan:
    """The plan with further adapters, each pinned by its digest.

    Raises:
        PackagingError: an adapter is not in the model store.
        ConfigError: a name is taken by the service's own adapters.
    """
    if taken := set(adapters) & set(plan.adapters):
        raise ConfigError(f"the Bento has an adapter {min(taken)!r} already: choose another name")
    added = {name: ModelStore().get(tag).reference for name, tag in adapters.items()}
    return replace(plan, added=added)


def share(plan: Plan, tell: Progress) -> None:
    """Put what the plan names where the nodes fetch it from, if they do.

    Raises:
        PackagingError: it cannot be put there.
    """
    if source := plan.config.ray.model_source:
        tell(f"copying {plan.tag} to {source}")
        shared.publish(plan.tag, source)
        for reference in plan.added.values():
            shared.publish(reference.partition("@")[0], source)


def _check_not_from_file(before: RunningApplication) -> None:
    """Ray Serve would go back to the file when its controller starts anew."""
    if before.is_from_file:
        raise DeploymentError(
            f"the application {before.name!r} was deployed from a file (`serve deploy`, KubeRay): "
            f"change that and apply it again, or first `mlops undeploy {before.name}`",
            _OPERATION,
            {"application": before.name},
        )


def _check_same_service(plan: Plan, before: RunningApplication) -> None:
    if before.is_foreign:
        raise DeploymentError(
            f"the application {plan.application!r} on this cluster is no service of this toolkit: "
            "package this one with another service name",
            _OPERATION,
            {"application": plan.application},
        )
    if before.plan is None:
        return
    ours, theirs = plan.config, before.plan.config
    if (ours.project_name, ours.service_name) != (theirs.project_name, theirs.service_name):
        raise DeploymentError(
            f"the application {plan.application!r} is the service {theirs.service_name!r} of the "
            f"project {theirs.project_name!r}: package this one with another service name",
            _OPERATION,
            {"application": plan.application},
        )


def _check_adapters(plan: Plan, cluster: Cluster) -> None:
    """Let one replica try the adapters, before all are told of them."""
    from ray import serve

    if not plan.added:
        return
    with translated(cluster.address):
        handle = serve.get_app_handle(plan.application)
        try:
            handle.check_adapters.remote(dict(plan.added)).result(timeout_s=TIMEOUT_S)
        except Exception as exc:
            raise DeploymentError(
                f"an adapter cannot be added: {reason_of(str(exc))}",
                _OPERATION,
                {"application": plan.application},
            ) from exc
        finally:
            handle.shutdown()  # one that is left behind would connect to Ray again


def _run(
    plan: Plan,
    before: RunningApplication | None,
    cluster: Cluster,
    timeout_s: float,
    tell: Progress,
) -> Deployed:
    plan = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))  # as Ray Serve tells of it

    def apply_and_wait() -> int:
        _apply(plan, cluster)
        try:
            return _wait(plan, before, cluster, timeout_s, tell)
        except DeploymentError as exc:
            if "failed" in exc.details:
                raise _take_back(plan, before, cluster, exc, tell) from exc
            raise

    try:
        num_replicas = cluster.watched(apply_and_wait)
    except KeyboardInterrupt as exc:
        exc.add_note(_how_to_take_back(plan, before, cluster))
        raise
    return Deployed(
        plan.application,
        plan.tag,
        serve_url() + plan.route_prefix.rstrip("/"),
        num_replicas,
        cluster.address,
        cluster.dashboard_url,
        cluster.log_folder,
        cluster.is_local,
    )


def _how_to_take_back(plan: Plan, before: RunningApplication | None, cluster: Cluster) -> str:
    if cluster.is_local:
        return "interrupted: the cluster ends, and nothing is deployed"
    going_back = (
        f"`mlops undeploy {plan.application}` takes it away"
        if before is None or before.plan is None
        else f"`mlops deploy {before.plan.tag}` goes back to what was there"
    )
    return (
        f"interrupted: the deployment of {plan.tag} goes on; `mlops status` shows how far it is, "
        f"and {going_back}"
    )


def _apply(plan: Plan, cluster: Cluster) -> None:
    """Tell Ray Serve; it does the rest."""
    from ray import serve

    from mlops.serving.ray.application import bind

    with translated(cluster.address):
        share_of_gpu = 1.0 if cluster.num_gpus and plan.config.apple_silicon.enable_mps else 0.0
        application = bind(plan, num_gpus=share_of_gpu)
        target = serve.RunTarget(application, name=plan.application, route_prefix=plan.route_prefix)
    cluster.ask(lambda: serve.run_many([target], wait_for_applications_running=False))


def _wait(
    plan: Plan,
    before: RunningApplication | None,
    cluster: Cluster,
    timeout_s: float,
    tell: Progress,
) -> int:
    """Return how many replicas answer, once those that are to are there."""
    low, high = plan.config.ray_replicas
    give_up_s = time.monotonic() + timeout_s
    began_s = well_s = placed_s = time.monotonic()
    was_seen = False
    while True:
        now = cluster.applications().get(plan.application)
        if not was_seen and now is not None and now.plan == plan:
            was_seen = True
            if before is not None and before.plan and before.plan.version != plan.version:
                cluster.drop_unplaced(before)
        is_settled = time.monotonic() - began_s > SETTLED_S
        now = _not_overtaken(plan, before, now, was_seen, is_settled)
        if now.status != "UNHEALTHY":
            well_s = time.monotonic()
        if not now.unplaced:
            placed_s = time.monotonic()
        state = now.replica_states or "Ray Serve does not know it yet"
        if time.monotonic() - placed_s > PLACED_S and (missing := cluster.room_missing(now)):
            state += f"; {missing}"
        if now.plan == plan:
            num_all = sum(now.replicas.values())
            if now.status == "RUNNING" and low <= now.num_running <= num_all <= high:
                return now.num_running
            # A replica that is being replaced makes it unhealthy for a while.
            if now.status == "DEPLOY_FAILED" or time.monotonic() - well_s > UNHEALTHY_S:
                raise DeploymentError(
                    f"{plan.tag} could not be deployed: {reason_of(now.message)}",
                    _OPERATION,
                    {"application": plan.application, "failed": now.status},
                )
        tell(state)
        if time.monotonic() > give_up_s:
            if now.message and not now.unplaced:
                state += f"; {reason_of(now.message)}"
            raise DeploymentError(
                f"{plan.tag} does not run after {timeout_s:g} s: {state}. It goes on starting: "
                "`mlops status` shows how far it is",
                _OPERATION,
                {"application": plan.application},
            )
        time.sleep(POLL_S)


def _not_overtaken(
    plan: Plan,
    before: RunningApplication | None,
    now: RunningApplication | None,
    was_seen: bool,
    is_settled: bool = True,
) -> RunningApplication:
    """What runs, when it is still what Ray Serve was told to run.

    Args:
        was_seen: Ray Serve has told of the plan. Until then it may tell of what was there before.
        is_settled: long enough ago for Ray Serve to tell of nothing that the plan has replaced.

    Raises:
        DeploymentError: Ray Serve was told something else since; says what.
    """
    if now is None or now.status == DELETING:
        by = f"`mlops undeploy {plan.application}`"
    elif (
        now.plan is None
        or now.plan == plan
        or (not was_seen and (not is_settled or (before and now.plan == before.plan)))
    ):
        return now
    else:
        low, high = now.plan.config.ray_replicas
        size = count(low, "replica") if low == high else f"{low}:{high} replicas"
        by = f"a deployment of {now.plan.tag} with {size}"
    raise DeploymentError(
        f"the deployment of {plan.tag} was overtaken by {by}: `mlops status` shows what runs",
        _OPERATION,
        {"application": plan.application},
    )


def _take_back(
    plan: Plan,
    before: RunningApplication | None,
    cluster: Cluster,
    exc: DeploymentError,
    tell: Progress,
) -> DeploymentError:
    """Leave things as they were; returns the error that says so."""
    if before is None or before.plan is None:
        with contextlib.suppress(DeploymentError):  # the reason of the failure is what counts
            failed = _find(plan.application, cluster)
            cluster.begin_delete(plan.application)
            _wait_until_gone(failed, cluster, TIMEOUT_S, tell)
        return exc
    _apply(before.plan, cluster)
    return DeploymentError(
        f"{exc.message}; {before.plan.tag} goes on serving", exc.operation, exc.details
    )


def _find(application: str, cluster: Cluster) -> RunningApplication:
    running = cluster.applications()
    found = running.get(application)
    if found is None or found.is_foreign:
        known = ", ".join(sorted(one.name for one in running.values() if not one.is_foreign))
        what = (
            f"no application {application!r}"
            if found is None
            else (f"an application {application!r}, which is no service of this toolkit,")
        )
        raise DeploymentError(
            f"there is {what} on this cluster; there is: {known or 'none'}",
            _OPERATION,
            {"application": application},
        )
    return found
