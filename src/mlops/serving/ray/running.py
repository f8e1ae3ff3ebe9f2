"""What is deployed on a cluster, as Ray Serve tells it, in our words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlops.errors import MLOpsError
from mlops.serving.ray.deployment import IMPORT_PATH, Plan

DELETING = "DELETING"
_MAX_NODES_TOLD = 8
_MAX_REASON = 2000


@dataclass(frozen=True)
class RunningApplication:
    """An application of Ray Serve, in whatever state.

    Attributes:
        plan: None where the application is no service of this toolkit's, or where Ray Serve does
            not tell: while it is being taken away, and in the moment after it was asked for.
        status: Ray Serve's: RUNNING, DEPLOYING, DEPLOY_FAILED, UNHEALTHY or DELETING.
        message: Ray Serve's, of the application or of its deployment; "" when all is well.
        replicas: how many there are, by Ray Serve's name for their state.
        target: how many there are to be.
        is_from_file: `serve deploy` or KubeRay asked for it.
        is_foreign: it is no service of this toolkit's.
        needs: what a replica takes of a node, by Ray's name for it.
        placed, unplaced: names of the replicas' actors that a node has taken, or none yet.
    """

    name: str
    plan: Plan | None
    status: str
    message: str = ""
    replicas: Mapping[str, int] = field(default_factory=dict)
    target: int = 0
    is_from_file: bool = False
    is_foreign: bool = False
    needs: Mapping[str, float] = field(default_factory=dict)
    placed: tuple[str, ...] = ()
    unplaced: tuple[str, ...] = ()

    @classmethod
    def read(cls, name: str, details: Mapping[str, Any]) -> RunningApplication:
        """What Ray Serve tells of an application."""
        status, message = _text(details["status"]), details.get("message") or ""
        is_from_file = _text(details.get("source")) == "declarative"
        deployments = list((details.get("deployments") or {}).values())
        for one in deployments:
            if plan := _plan_of(one["deployment_config"].get("user_config")):
                states = Counter(_text(replica["state"]) for replica in one["replicas"])
                return cls(
                    name,
                    plan,
                    status,
                    one.get("message") or message,
                    dict(states),
                    one.get("target_num_replicas") or 0,
                    is_from_file,
                    needs={k: v for k, v in (one.get("required_resources") or {}).items() if v},
                    placed=tuple(
                        replica["actor_name"] for replica in one["replicas"] if _is_placed(replica)
                    ),
                    unplaced=tuple(
                        replica["actor_name"]
                        for replica in one["replicas"]
                        if not _is_placed(replica)
                    ),
                )
        file = details.get("deployed_app_config") or {}
        plan = _plan_of({"plan": file.get("args")}) if _is_ours(file) else None
        is_foreign = bool(deployments or file) and not _is_ours(file)
        return cls(name, plan, status, message, is_from_file=is_from_file, is_foreign=is_foreign)

    @property
    def num_running(self) -> int:
        """Replicas that answer."""
        return self.replicas.get("RUNNING", 0)

    @property
    def tag(self) -> str:
        """Of its Bento or model; "" where that is not known."""
        return self.plan.tag if self.plan else ""

    @property
    def replica_states(self) -> str:
        """The state of its replicas in a few words."""
        states = [f"{count} {state.lower()}" for state, count in sorted(self.replicas.items())]
        if self.plan is None:
            return ", ".join(states)
        return f"{', '.join(states) or 'no replica yet'} of {self.target}"


def room_missing(
    needs: Mapping[str, float],
    free: Mapping[str, Mapping[str, float]],
    total: Mapping[str, Mapping[str, float]],
) -> str:
    """Why no node has room for a replica; "" when one has.

    Args:
        needs: what a replica takes, by Ray's name for it.
        free, total: what each node has, by its name.
    """
    if any(_covers(free.get(node, {}), needs) for node in total):
        return ""
    nodes = sorted(total, key=lambda node: not _covers(total[node], needs))
    told = [
        f"{node} has {_amounts(needs, free.get(node, {}))} free of {_amounts(needs, total[node])}"
        for node in nodes[:_MAX_NODES_TOLD]
    ]
    if len(nodes) > len(told):
        told.append(f"{len(nodes) - len(told)} more have no room either")
    return f"no node has room for a replica, which takes {_amounts(needs, needs)}: " + (
        "; ".join(told) or "there are no nodes"
    )


def reason_of(text: str) -> str:
    """The last error in a traceback that Ray tells, as one sentence; else the text's last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        name, colon, rest = line.partition(": ")
        if colon and name.rpartition(".")[2].endswith(("Error", "Exception")) and " " not in name:
            is_ours = name.startswith("mlops.")
            return (rest if is_ours else f"{name.rpartition('.')[2]}: {rest}")[:_MAX_REASON]
    return (lines[-1] if lines else "no reason was given")[:_MAX_REASON]


def _plan_of(user_config: Any) -> Plan | None:
    if not isinstance(user_config, Mapping) or not isinstance(user_config.get("plan"), Mapping):
        return None
    try:
        return Plan.from_dict(user_config["plan"])
    except MLOpsError:
        return None


def _is_placed(replica: Mapping[str, Any]) -> bool:
    return _text(replica["state"]) != "STARTING" or bool(replica.get("node_id"))


def _is_ours(file: Mapping[str, Any]) -> bool:
    return file.get("import_path") == IMPORT_PATH


def _covers(has: Mapping[str, float], needs: Mapping[str, float]) -> bool:
    return all(has.get(name, 0) >= amount for name, amount in needs.items())


def _amounts(names: Iterable[str], has: Mapping[str, float]) -> str:
    def amount(name: str) -> str:
        if name == "memory":
            return f"{has.get(name, 0) / 2**20:.0f} MB of memory"
        return f"{has.get(name, 0):g} {name}"

    return ", ".join(amount(name) for name in names)


def _text(value: Any) -> str:
    """The text of what Ray tells as an enumeration."""
    return str(getattr(value, "value", value))
