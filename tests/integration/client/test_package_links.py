"""The link between a run and a package, with MLflow there and with MLflow down."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest

from mlops.client import FlushResult, TrackingClient, create_client, recall
from mlops.client.link_queue import LinkQueue, PackageLink
from mlops.errors import TrackingError

RESULT = {
    "success": True,
    "model_tag": "lora_adapter:1.0.0",
    "bento_tag": "my_service:abc",
    "model_digest": "sha256:" + "0" * 64,
    "project_name": "my_project",
}
FACTS = {key: str(value) for key, value in RESULT.items() if key != "success"}


def mlflow_of(client: TrackingClient) -> Any:
    import mlflow

    return mlflow.MlflowClient(tracking_uri=client.tracking_uri)


def tags_of(client: TrackingClient, run_id: str | None, prefix: str = "") -> dict[str, str]:
    """The facts of a link, or the tags that begin in a certain way."""
    tags = mlflow_of(client).get_run(run_id).data.tags
    wanted = [key for key in tags if (key.startswith(prefix) if prefix else key in FACTS)]
    return {key: tags[key] for key in wanted}


@pytest.fixture
def client(store: Path) -> Iterator[TrackingClient]:
    client = create_client("my_project")
    yield client
    client.close()


def test_a_link_leads_from_the_run_to_the_package_and_back(client: TrackingClient) -> None:
    with client.start_run() as run:
        link = client.link_package(RESULT)
    assert (link.linked, link.queued, link.reason, link.run_id) == (True, False, "", run.run_id)
    assert tags_of(client, run.run_id) == FACTS
    assert mlflow_of(client).get_run(run.run_id).data.params == FACTS
    model = mlflow_of(client).get_logged_model(link.model_id)
    assert {key: model.tags[key] for key in FACTS} == FACTS
    assert (model.name, model.status, model.source_run_id) == (
        "lora_adapter",
        "READY",
        run.run_id,
    )
    assert client.runs_of("lora_adapter:1.0.0") == [run.run_id]
    assert client.runs_of("my_service:abc") == [run.run_id]
    assert client.runs_of("other:1") == []
    with pytest.raises(TrackingError, match="quotes"):
        client.runs_of("' OR 1=1")


def test_linking_twice_makes_one_link(client: TrackingClient) -> None:
    assert client.link_package(RESULT) == client.link_package(RESULT)


def test_a_second_package_in_one_run(client: TrackingClient) -> None:
    client.link_package(RESULT)
    again = client.link_package({**RESULT, "model_tag": "lora_adapter:2.0.0", "bento_tag": None})
    assert again.linked
    assert mlflow_of(client).get_run(client.run_id).data.params["model_tag"] == RESULT["model_tag"]
    assert tags_of(client, client.run_id)["model_tag"] == "lora_adapter:2.0.0"
    assert client.runs_of("lora_adapter:1.0.0") == client.runs_of("lora_adapter:2.0.0")


def test_a_finished_run_can_be_linked(client: TrackingClient) -> None:
    with client.start_run() as run:
        pass
    assert client.link_package(RESULT, run_id=run.run_id).run_id == run.run_id
    assert client.active_run_id is None


def test_misuse_is_an_error_and_is_not_queued(client: TrackingClient) -> None:
    with pytest.raises(TrackingError, match="could not find the run"):
        client.link_package(RESULT, run_id="0" * 32)
    with client.start_run() as run:
        pass
    mlflow_of(client).delete_run(run.run_id)
    with pytest.raises(TrackingError, match="deleted"):
        client.link_package(RESULT, run_id=run.run_id)
    with pytest.raises(TrackingError, match="packaging result"):
        client.link_package({"success": True})
    assert LinkQueue().waiting() == []


def test_a_link_waits_while_mlflow_is_down(client: TrackingClient, dead_uri: str) -> None:
    down = create_client("my_project", tracking_uri=dead_uri.replace("://", "://me:secret@"))
    link = down.link_package(RESULT)
    assert (link.linked, link.queued, link.run_id) == (False, True, None)
    assert "refused" in link.reason
    assert dead_uri in link.reason
    assert LinkQueue().waiting() == [PackageLink(dead_uri, "my_project", None, FACTS)]
    assert "secret" not in LinkQueue().path.read_text()

    flushed = down.flush_queue()
    assert (flushed.sent, flushed.remaining) == (0, 1)
    assert "refused" in flushed.reason
    # The queue of one store is no other store's.
    assert client.flush_queue() == FlushResult(sent=0, remaining=1)


def test_a_server_that_never_answers_is_down(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlops.client.connection.CHECK_TIMEOUT_S", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        link = create_client("p", tracking_uri=uri).link_package(RESULT)
    assert (link.linked, link.queued) == (False, True)
    assert "timed out" in link.reason


def test_a_server_that_fails_is_down(store: Path) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Failing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(503)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever).start()
        client = create_client("p", tracking_uri=f"http://127.0.0.1:{server.server_port}")
        link = client.link_package(RESULT)
        server.shutdown()
    assert link.queued
    assert "status 503" in link.reason


def test_the_queue_is_sent_with_the_next_link(client: TrackingClient) -> None:
    with client.start_run() as run:
        pass
    waiting = [
        PackageLink(client.tracking_uri, "my_project", run.run_id, FACTS),
        PackageLink(client.tracking_uri, "other_project", None, {"model_tag": "late:1"}),
        PackageLink("http://elsewhere.test", "my_project", None, {"model_tag": "elsewhere:1"}),
    ]
    for link in waiting:
        LinkQueue().add(link)
    assert client.link_package({"model_tag": "now:1"}).linked
    assert LinkQueue().waiting() == waiting[2:]
    assert tags_of(client, run.run_id) == FACTS
    other = create_client("other_project")
    [late] = other.runs_of("late:1")
    found = mlflow_of(client).get_run(late)
    assert (found.info.run_name, found.info.status) == ("package late:1", "FINISHED")


def test_sending_a_link_again_makes_nothing_new(client: TrackingClient) -> None:
    link = PackageLink(client.tracking_uri, "my_project", None, FACTS)
    for _ in range(2):  # as if the process was killed before it took the link out
        LinkQueue().add(link)
        assert client.flush_queue() == FlushResult(sent=1, remaining=0)
    [run_id] = client.runs_of("my_service:abc")
    experiment = mlflow_of(client).get_run(run_id).info.experiment_id
    assert len(mlflow_of(client).search_runs([experiment])) == 1
    assert len(mlflow_of(client).search_logged_models([experiment])) == 1


def test_a_link_that_can_never_be_sent_is_set_aside(client: TrackingClient) -> None:
    lost = PackageLink(client.tracking_uri, "my_project", "0" * 32, FACTS)
    good = PackageLink(client.tracking_uri, "my_project", None, {"model_tag": "good:1"})
    LinkQueue().add(lost)
    LinkQueue().add(good)
    flushed = client.flush_queue()
    assert (flushed.sent, flushed.remaining, flushed.reason) == (1, 0, "")
    assert "0" * 32 in flushed.rejected[0]
    assert "0" * 32 in LinkQueue().rejected_path.read_text()


def test_a_link_that_cannot_even_wait_is_reported(store: Path, dead_uri: str) -> None:
    (store / "bentoml").write_text("a file where the home should be")
    client = create_client("p", tracking_uri=dead_uri)
    link = client.link_package(RESULT)
    assert (link.linked, link.queued) == (False, False)
    assert "nor can the link be queued" in link.reason
    assert "cannot be used" in client.flush_queue().reason


def test_a_real_server_until_it_dies(store: Path) -> None:
    with tracking_server(store) as uri:
        client = create_client("my_project", tracking_uri=uri)
        with client.start_run() as run:
            client.log_artifact(__file__)
            client.log_model({"weight": np.ones(2)}, "model")
            link = client.link_package(RESULT)
        with client.start_run() as later:
            part = {"tag": "lora_adapter:1.0.0", "digest": RESULT["model_digest"]}
            parts = {"adapter.tone": part}
            client.link_package({"bento_tag": "many:1", "model_tag": "base:1", "parts": parts})
        assert tags_of(client, later.run_id, "adapter.") == {
            "adapter.tone": f"lora_adapter:1.0.0@{RESULT['model_digest']}",
            "adapter.tone.run_id": run.run_id,
        }
        assert tags_of(client, run.run_id, "package.") == {"package.many.1": later.run_id}
        origin = recall(str(RESULT["model_digest"]))[0]
        experiment = mlflow_of(client).get_run(run.run_id).info.experiment_id
        assert origin.url == f"{uri}/#/experiments/{experiment}/runs/{run.run_id}"
        files = client.load_model_files(run.run_id)
        assert (files / "model.safetensors").exists()
        assert (link.linked, link.run_id) == (True, run.run_id)
        assert client.runs_of("my_service:abc") == [run.run_id]
        assert mlflow_of(client).get_run(run.run_id).info.status == "FINISHED"
        [artifact] = mlflow_of(client).list_artifacts(run.run_id)
        assert artifact.path == Path(__file__).name
        crashing = client.start_run()

    with pytest.raises(ZeroDivisionError), crashing:
        assert client.link_package(RESULT).queued
        raise ZeroDivisionError
    assert client.active_run_id is None
    assert [link.run_id for link in LinkQueue().waiting()] == [crashing.run_id]


@contextmanager
def tracking_server(folder: Path) -> Iterator[str]:
    """A real `mlflow server` on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "server artifacts")]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
    try:
        while True:
            assert process.poll() is None, (folder / "server.log").read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (URLError, OSError):
                threading.Event().wait(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
