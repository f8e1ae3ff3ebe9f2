"""Ties packages to runs, at once or when MLflow is there again."""

from __future__ import annotations

import logging
from typing import Any

from mlops.client.connection import Connection, error_code, translated
from mlops.client.lineage import (
    RunPlace,
    is_there,
    link_parts,
    logged_models,
    place_of,
    with_tag,
)
from mlops.client.link_queue import FlushResult, LinkQueue, LinkResult, PackageLink
from mlops.client.run_records import COMES_FROM, PACKAGED_BY, record_of, remember
from mlops.client.runs import (
    EXTERNAL_TAG,
    LINK_TAG,
    create_logged_model,
    create_run,
    write_params,
    write_tags,
)
from mlops.errors import TrackingError

_NOT_IN_A_MODEL_NAME = str.maketrans(dict.fromkeys("/:.%\"'", "-"))
_MISUSE = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"})

logger = logging.getLogger(__name__)


def is_misuse(error: TrackingError) -> bool:
    """True when MLflow says that the link itself is wrong, so that no later try can help."""
    return error_code(error) in _MISUSE


class PackageLinker:
    """Sends links to one MLflow store, and queues those that it does not take."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._queue = LinkQueue()

    def is_sent(self, link: PackageLink) -> bool:
        """True when MLflow has this link, for some run of the project if the link names none.

        Raises:
            TrackingError: MLflow is down or refuses.
        """
        return self._find_model(link) is not None

    def send(self, link: PackageLink) -> LinkResult:
        """Write a link to MLflow. What an earlier, interrupted try wrote is used again.

        Raises:
            TrackingError: MLflow is down or refuses.
        """
        model = self._find_model(link)
        run_id = link.run_id or (str(model.source_run_id) if model else self._run_for(link))
        place = place_of(self._connection, run_id)
        write_tags(self._connection, run_id, link.facts)
        write_params(self._connection, run_id, link.facts)
        if model is None:
            name = link.package_tag.partition(":")[0].translate(_NOT_IN_A_MODEL_NAME)
            tags = {**link.facts, LINK_TAG: link.link_id, EXTERNAL_TAG: "true"}
            model = create_logged_model(
                self._connection, place.experiment_id, run_id, name=name, tags=tags
            )
        sources = link_parts(self._connection, link.title, run_id, link.parts)
        self._remember(link, place, sources)
        return LinkResult(linked=True, run_id=run_id, model_id=str(model.model_id))

    def keep_for_later(self, link: PackageLink, reason: str) -> LinkResult:
        """Queue a link; the result says whether that worked, and why it was necessary."""
        try:
            self._queue.add(link)
        except OSError as exc:
            lost = f"{reason}; nor can the link be queued: {exc}"
            logger.warning("the package is not linked to MLflow: %s", lost)
            return LinkResult(linked=False, reason=lost, run_id=link.run_id)
        logger.warning("the package's link to MLflow waits in %s: %s", self._queue.path, reason)
        return LinkResult(linked=False, queued=True, reason=reason, run_id=link.run_id)

    def flush(self) -> FlushResult:
        """Send the links that wait for this store, in their order, until MLflow fails."""
        done: list[PackageLink] = []
        rejected: dict[PackageLink, str] = {}
        num_waiting = 0
        reason = ""
        try:
            with self._queue.sending() as may_send:
                waiting = self._queue.waiting()
                num_waiting = len(waiting)
                store = self._connection.public_uri
                mine = [link for link in waiting if link.tracking_uri == store]
                if mine and not may_send:
                    reason = "another process sends them now"
                elif mine:
                    reason = self._send_all(mine, done, rejected)
                    self._queue.remove(done)
                    self._queue.reject(list(rejected))
        except OSError as exc:
            reason = f"the queue {self._queue.path} cannot be used: {exc}"
        return FlushResult(
            sent=len(done),
            remaining=num_waiting - len(done) - len(rejected),
            rejected=list(rejected.values()),
            reason=reason,
        )

    def _send_all(
        self, links: list[PackageLink], done: list[PackageLink], rejected: dict[PackageLink, str]
    ) -> str:
        """Returns why MLflow failed, "" when it did not."""
        try:
            self._connection.check()
            for link in links:
                try:
                    self.send(link)
                    done.append(link)
                except TrackingError as exc:
                    if not is_misuse(exc):
                        raise
                    logger.warning("MLflow rejects a queued link: %s", exc)
                    rejected[link] = str(exc)
        except TrackingError as exc:
            return str(exc)
        return ""

    def _find_model(self, link: PackageLink) -> Any:
        """The external logged model that an earlier try made for the same link, or None."""
        run_id = link.run_id
        if run_id:
            experiment = place_of(self._connection, run_id).experiment_id
        else:
            experiment = self._connection.experiment_id(link.project_name)
        found = logged_models(self._connection, LINK_TAG, link.link_id, [experiment])
        for model in found:
            if run_id == model.source_run_id or (
                not run_id and is_there(self._connection, model.source_run_id)
            ):
                return model
        return None

    def _run_for(self, link: PackageLink) -> str:
        """A finished run of its own, for a package that was made outside of any."""
        experiment = self._connection.experiment_id(link.project_name)
        client = self._connection.client
        with translated("look for an earlier run"):
            earlier = client.search_runs([experiment], with_tag(LINK_TAG, link.link_id))
        if earlier:
            return str(earlier[0].info.run_id)
        tags = {LINK_TAG: link.link_id}
        run_id = create_run(self._connection, link.project_name, tags, f"package {link.title}")
        with translated("end the run"):
            client.set_terminated(run_id)
        return run_id

    def _remember(self, link: PackageLink, run: RunPlace, sources: dict[str, RunPlace]) -> None:
        """Keep on this machine which runs each stored model of the package belongs to."""
        store = self._connection.public_uri
        for role, part in link.parts.items():
            if source := sources.get(role):
                remember(part["digest"], record_of(COMES_FROM, "", store, source))
            remember(part["digest"], record_of(PACKAGED_BY, link.title, store, run))


def runs_of(connection: Connection, project_name: str, package_tag: str) -> list[str]:
    """The runs of a project that a model tag or bento tag is linked to, newest first."""
    experiment = connection.experiment_id(project_name)
    found = [
        model
        for key in ("model_tag", "bento_tag")
        for model in logged_models(connection, key, package_tag, [experiment])
    ]
    newest_first = sorted(found, key=lambda model: model.creation_timestamp, reverse=True)
    return list(dict.fromkeys(str(model.source_run_id) for model in newest_first))
