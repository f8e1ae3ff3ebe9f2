"""Which runs a stored model belongs to, kept on this machine: it is found without asking MLflow.

One file for each model digest in `mlops/runs` of the BentoML home, with a JSON object on each line.
Written when a link reaches MLflow, and never read by anything that packages or serves. For a model
that was linked on another machine, MLflow is asked.
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mlops.client.connection import Connection, resolve_tracking_uri
from mlops.client.lineage import RunPlace, find_origin
from mlops.client.link_queue import private_folder

COMES_FROM = "comes from"
PACKAGED_BY = "packaged by"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRecord:
    """One run that a stored model belongs to.

    Attributes:
        relation: `COMES_FROM` or `PACKAGED_BY`.
        package: the tag of the package that the run made; "" for the run that it comes from.
        tracking_uri: the MLflow store, without credentials.
    """

    relation: str
    package: str
    tracking_uri: str
    run_id: str
    run_name: str
    experiment_id: str
    experiment: str

    @property
    def url(self) -> str | None:
        """The run's page, where MLflow is a server."""
        if not self.tracking_uri.startswith(("http://", "https://")):
            return None
        server = self.tracking_uri.rstrip("/")
        return f"{server}/#/experiments/{self.experiment_id}/runs/{self.run_id}"


def record_of(relation: str, package: str, tracking_uri: str, place: RunPlace) -> RunRecord:
    """The record for a run in an MLflow store."""
    return RunRecord(relation, package, tracking_uri, **asdict(place))


def remember(model_digest: str, record: RunRecord) -> None:
    """Keep a record; one that is there already stays as it is. A failure is only logged."""
    path = _path(model_digest)
    line = json.dumps(asdict(record), sort_keys=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            if line not in file.read().splitlines():
                file.write(f"{line}\n")
    except (OSError, ValueError) as exc:
        logger.warning("%s cannot be kept for `mlops models show`: %s", path, exc)


def recall(model_digest: str) -> list[RunRecord]:
    """The records of a stored model, in the order of their arrival; damaged lines are left out."""
    try:
        lines = _path(model_digest).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [record for line in lines if (record := _parse(line))]


def ask_mlflow(tracking_uri: str, part: Mapping[str, str]) -> list[RunRecord]:
    """The run that a stored model comes from, as an MLflow store knows it; none when it does not.

    Args:
        part: its tag and digests, as in a packaging result's `parts`.

    Raises:
        ConfigError: the address is none.
        TrackingError: there is no store, or it is down.
    """
    connection = Connection(resolve_tracking_uri(tracking_uri))
    connection.require()
    origin = find_origin(connection, "adapter", part)
    if origin is None:
        return []
    return [record_of(COMES_FROM, "", connection.public_uri, origin.run)]


def _path(model_digest: str) -> Path:
    return private_folder() / "runs" / f"{model_digest.removeprefix('sha256:')}.jsonl"


def _parse(line: str) -> RunRecord | None:
    try:
        record = RunRecord(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return None
    return record if all(isinstance(value, str) for value in asdict(record).values()) else None
