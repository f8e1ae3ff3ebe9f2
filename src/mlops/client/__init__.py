"""MLflow tracking: what was trained, with which settings, and which package it became.

`create_client(project)` gives a client whose runs, parameters, metrics, artifacts and models land
in the MLflow experiment of that name. The packager calls `link_package`, which ties a run to the
tags and the digest of a package, and never fails because MLflow is down: such a link waits in a
queue (`mlops.client.link_queue`) and is sent with the next one.
"""

from mlops.client.link_queue import FlushResult, LinkResult
from mlops.client.run_records import RunRecord, ask_mlflow, recall
from mlops.client.tracking import ActiveRun, LoggedModel, TrackingClient, create_client

__all__ = [
    "ActiveRun",
    "FlushResult",
    "LinkResult",
    "LoggedModel",
    "RunRecord",
    "TrackingClient",
    "ask_mlflow",
    "create_client",
    "recall",
]
