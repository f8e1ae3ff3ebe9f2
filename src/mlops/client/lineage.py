"""From the parts of a package to the runs that they come from, and back.

A part is a stored model of the package: the model itself, its base, or an adapter. It comes from
the run that its label `mlflow_run_id` names; else from the first run that logged the same files
with `log_model`; else, for an adapter or a base, from the first run that packaged the same content.
Digests decide, so no name and no path has to be kept.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlops.client.connection import Connection, error_code, translated
from mlops.client.runs import DIGEST_TAG, LINK_TAG, MAX_TAG_CHARS, write_tags
from mlops.errors import TrackingError

NOTE_TAG = "mlflow.note.content"
"""MLflow's own tag for the description on a run's page; it is Markdown."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunPlace:
    """Where a run is in its MLflow store."""

    run_id: str
    run_name: str
    experiment_id: str
    experiment: str

    @property
    def markdown(self) -> str:
        """A link that works on any page of MLflow's, wherever that is served."""
        name = " ".join(self.run_name.translate(str.maketrans("[]`", "()'")).split())
        return f"[{name}](#/experiments/{self.experiment_id}/runs/{self.run_id})"


@dataclass(frozen=True)
class Origin:
    """The run that a part comes from, and the model that was logged there, where it was found."""

    run: RunPlace
    model: Any = None


def link_parts(
    connection: Connection, package_tag: str, run_id: str, parts: Mapping[str, Mapping[str, str]]
) -> dict[str, RunPlace]:
    """Write to the package's run where its parts come from, and to those runs what they became.

    Writing it again changes nothing.

    Returns:
        The runs that parts come from, by role. A part that no run is known for is left out.

    Raises:
        TrackingError: MLflow is down or refuses.
    """
    package = place_of(connection, run_id)
    origins = {
        role: origin
        for role, part in parts.items()
        if (origin := find_origin(connection, role, part))
    }
    tags = {role: f"{part['tag']}@{part['digest']}" for role, part in parts.items()}
    tags.pop("model", None)  # facts of the link
    lines = []
    for role, origin in origins.items():
        if origin.run == package:
            continue
        tags[f"{role}.run_id"] = origin.run.run_id
        lines.append(f"- {role} `{parts[role]['tag']}` comes from the run {origin.run.markdown}")
        try:
            _write_back(connection, origin, package, package_tag, {"role": role, **parts[role]})
        except TrackingError as exc:
            if error_code(exc) != "PERMISSION_DENIED":
                raise
            logger.warning("the run %s is not this user's to change: %s", origin.run.run_id, exc)
    if tags:
        write_tags(connection, run_id, tags)
    _note(connection, run_id, lines)
    return {role: origin.run for role, origin in origins.items()}


def find_origin(connection: Connection, role: str, part: Mapping[str, str]) -> Origin | None:
    """Where a part comes from; None when no run is known.

    Raises:
        TrackingError: MLflow is down or refuses.
    """
    if named := part.get("run_id"):
        if run := _existing(connection, named):
            return Origin(run)
        logger.warning("%s names the run %s, which is not there", part["tag"], named)
    if files_digest := part.get("files_digest"):
        for model in logged_models(connection, DIGEST_TAG, files_digest):
            if run := _existing(connection, model.source_run_id):
                return Origin(run, model)
    if role != "model":
        for model in logged_models(connection, "model_digest", part["digest"]):
            if run := _existing(connection, model.source_run_id, made_by_user=True):
                return Origin(run)
    return None


def logged_models(
    connection: Connection, key: str, value: str, experiments: list[str] | None = None
) -> list[Any]:
    """MLflow's logged models with a tag, the oldest first.

    Args:
        experiments: where to look; by default in all.

    Raises:
        TrackingError: MLflow is down or refuses, or the value cannot be looked for.
    """
    client = connection.client
    with translated(f"look for {value}"):
        experiments = experiments or _all_experiments(client)
        found: list[Any] = []
        token = None
        while experiments:
            page = client.search_logged_models(experiments, with_tag(key, value), page_token=token)
            found += page
            if not (token := page.token):
                break
    return sorted(found, key=lambda model: model.creation_timestamp)


def with_tag(key: str, value: str) -> str:
    """MLflow's filter for a tag's value."""
    if "'" in value or "`" in value:
        raise TrackingError(f"{value!r} cannot be looked for; a tag has no quotes")
    return f"tags.`{key}` = '{value}'"


def place_of(connection: Connection, run_id: str) -> RunPlace:
    """Where a run is.

    Raises:
        TrackingError: there is no such run, or MLflow is down.
    """
    with translated(f"find the run {run_id!r}"):
        return _place(connection, connection.client.get_run(run_id))


def _place(connection: Connection, run: Any) -> RunPlace:
    info = run.info
    experiment = connection.client.get_experiment(info.experiment_id)
    return RunPlace(info.run_id, info.run_name or info.run_id, info.experiment_id, experiment.name)


def is_there(connection: Connection, run_id: str) -> bool:
    """True for a run that was not deleted."""
    return _existing(connection, run_id) is not None


def _existing(
    connection: Connection, run_id: str, *, made_by_user: bool = False
) -> RunPlace | None:
    """A run that was not deleted; with `made_by_user`, none that a link made for a package."""
    try:
        with translated(f"find the run {run_id!r}"):
            run = connection.client.get_run(run_id)
            if run.info.lifecycle_stage == "deleted":
                return None
            return None if made_by_user and LINK_TAG in run.data.tags else _place(connection, run)
    except TrackingError as exc:
        if error_code(exc) not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            raise
        return None


def _all_experiments(client: Any) -> list[str]:
    found: list[str] = []
    token = None
    while True:
        page = client.search_experiments(page_token=token)
        found += [experiment.experiment_id for experiment in page]
        if not (token := page.token):
            return found


def _write_back(
    connection: Connection,
    origin: Origin,
    package: RunPlace,
    package_tag: str,
    part: Mapping[str, str],
) -> None:
    """Tell the run that a part comes from, and the model logged there, what it became."""
    became = {f"package.{package_tag.replace(':', '.')}": package.run_id}
    write_tags(connection, origin.run.run_id, became)
    line = (
        f"- stored as `{part['tag']}`, and packaged as {part['role']} of `{package_tag}` by the "
        f"run {package.markdown}"
    )
    _note(connection, origin.run.run_id, [line])
    if origin.model is None:
        return
    client, model_id = connection.client, origin.model.model_id
    tags = {**became, "model_tag": part["tag"], "model_digest": part["digest"]}
    with translated(f"link the model {origin.model.name}"):
        from mlflow.entities import LoggedModelInput

        client.set_logged_model_tags(model_id, tags)
        client.log_inputs(package.run_id, models=[LoggedModelInput(model_id)])


def _note(connection: Connection, run_id: str, lines: list[str]) -> None:
    """Add lines to the description of a run, below what people wrote; each of them once.

    They are for readers: where MLflow has no room for more, the tags still say all.
    """
    with translated(f"read the run {run_id!r}"):
        note = connection.client.get_run(run_id).data.tags.get(NOTE_TAG, "")
    kept = note.splitlines()
    new = [line for line in lines if line not in kept]
    if not new:
        return
    is_list = bool(kept) and kept[-1].startswith("- ")
    text = note + ("" if not note else "\n" if is_list else "\n\n") + "\n".join(new)
    if len(text) <= MAX_TAG_CHARS:
        write_tags(connection, run_id, {NOTE_TAG: text})
