"""What a user finds in MLflow after using the client."""

from __future__ import annotations

import json
import logging
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlops.client import TrackingClient, create_client
from mlops.errors import TrackingError


def mlflow_of(client: TrackingClient) -> Any:
    import mlflow

    return mlflow.MlflowClient(tracking_uri=client.tracking_uri)


def run_of(client: TrackingClient, run_id: str | None = None) -> Any:
    return mlflow_of(client).get_run(run_id or client.run_id)


@pytest.fixture
def client(store: Path) -> Any:
    client = create_client("my_project")
    yield client
    client.close()


# Runs


def test_logging_needs_no_run_and_close_ends_it(client: TrackingClient) -> None:
    client.log_param("rank", 8)
    client.log_params({"scale": 2.0, "target": "q_proj"})
    client.log_metrics({"loss": 1.5, "model_loaded": int(True)})
    client.log_metric("loss", np.float32(0.5), step=1)
    client.set_tag("stage", "test")
    client.set_tags({"team": "ml"})
    assert run_of(client).info.status == "RUNNING"
    client.close()

    run = run_of(client)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"rank": "8", "scale": "2.0", "target": "q_proj"}
    assert run.data.metrics == {"loss": 0.5, "model_loaded": 1.0}
    assert (run.data.tags["stage"], run.data.tags["team"]) == ("test", "ml")
    assert mlflow_of(client).get_experiment(run.info.experiment_id).name == "my_project"
    history = mlflow_of(client).get_metric_history(client.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(0, 1.5), (1, 0.5)]


def test_everything_without_a_run_goes_to_one_run(client: TrackingClient) -> None:
    client.log_param("a", 1)
    run_id = client.run_id
    client.log_metric("b", 2)
    assert client.active_run_id == client.run_id == run_id
    client.close()
    assert client.active_run_id is None
    client.log_param("a", 2)
    assert client.run_id != run_id


def test_a_run_has_a_name_and_tags(client: TrackingClient) -> None:
    with client.start_run("training", tags={"seed": 1}) as run:
        client.log_param("rank", 8)
        assert client.active_run_id == run.run_id
    found = run_of(client, run.run_id)
    assert (found.info.run_name, found.info.status) == ("training", "FINISHED")
    assert found.data.tags["seed"] == "1"
    assert found.data.params == {"rank": "8"}


def test_a_run_in_a_run_is_its_child(client: TrackingClient) -> None:
    with client.start_run("outer") as outer:
        with client.start_run("inner") as inner:
            client.log_param("where", "inner")
        client.log_param("where", "outer")
    assert run_of(client, inner.run_id).data.tags["mlflow.parentRunId"] == outer.run_id
    assert run_of(client, inner.run_id).data.params == {"where": "inner"}
    assert run_of(client, outer.run_id).data.params == {"where": "outer"}


@pytest.mark.parametrize(
    ("error", "status"),
    [(ZeroDivisionError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "FINISHED")],
)
def test_the_status_says_how_the_block_ended(
    client: TrackingClient, error: type[BaseException], status: str
) -> None:
    with pytest.raises(error), client.start_run() as run:
        client.start_run("forgotten")
        raise error
    assert run_of(client, run.run_id).info.status == status
    assert run_of(client).info.status == status
    assert client.active_run_id is None


def test_the_client_itself_is_a_context_manager(store: Path) -> None:
    with pytest.raises(ZeroDivisionError), create_client("p") as client:
        client.log_param("a", 1)
        raise ZeroDivisionError
    assert run_of(client).info.status == "FAILED"


def test_end_run_ends_the_inner_run_first(client: TrackingClient) -> None:
    outer, inner = client.start_run(), client.start_run()
    client.end_run("KILLED")
    assert client.active_run_id == outer.run_id
    assert run_of(client, inner.run_id).info.status == "KILLED"
    client.end_run()
    client.end_run()
    assert client.active_run_id is None
    with pytest.raises(TrackingError, match="FINISHED, FAILED or KILLED"):
        client.end_run("DONE")  # type: ignore[arg-type]


Ended = dict[str, subprocess.CompletedProcess[str]]


def test_processes_that_begin_together_share_one_experiment(
    first_processes: tuple[Path, Ended],
) -> None:
    """The store did not exist: one of them made its tables and the experiment."""
    folder, ended = first_processes
    assert [file.name for file in folder.iterdir()] == ["mlflow.db"]
    mlflow = mlflow_of(create_client("p", tracking_uri=f"sqlite:///{folder}/mlflow.db"))
    experiment = mlflow.get_experiment_by_name("shared project")
    runs = {run.info.run_id for run in mlflow.search_runs([experiment.experiment_id])}
    assert runs == {done.stdout.split()[0] for done in ended.values()}


@pytest.mark.parametrize(
    ("end", "returncode", "status"),
    [
        ("quietly", 0, "FINISHED"),
        ("with an error", 1, "FAILED"),
        ("after its child", 0, "FINISHED"),
    ],
)
def test_a_run_ends_with_its_process(
    first_processes: tuple[Path, Ended], end: str, returncode: int, status: str
) -> None:
    folder, ended = first_processes
    done = ended[end]
    assert done.returncode == returncode, done.stderr
    assert returncode or not done.stderr
    client = create_client("p", tracking_uri=f"sqlite:///{folder}/mlflow.db")
    assert run_of(client, done.stdout.split()[0]).info.status == status


def test_a_forked_child_leaves_its_parents_run_open(first_processes: tuple[Path, Ended]) -> None:
    done = first_processes[1]["after its child"]
    assert done.stdout.split()[1:] == ["RUNNING"], done.stderr


# What is logged


def test_a_parameter_keeps_its_first_value_and_the_second_is_a_tag(
    client: TrackingClient, caplog: pytest.LogCaptureFixture
) -> None:
    client.log_param("bento_tag", "model:1")
    with caplog.at_level(logging.WARNING, "mlops"):
        client.log_params({"bento_tag": "model:2", "rank": 8})
        client.log_param("rank", 8)
    run = run_of(client)
    assert run.data.params == {"bento_tag": "model:1", "rank": "8"}
    assert run.data.tags["bento_tag"] == "model:2"
    assert [record.message for record in caplog.records] == [
        "MLflow keeps the first value of a parameter; the new value of bento_tag is a tag"
    ]


def test_hundreds_of_values_at_once(client: TrackingClient) -> None:
    client.log_params({f"p{i}": i for i in range(250)})
    client.set_tags({f"t{i}": i for i in range(250)})
    client.log_metrics({f"m{i}": i for i in range(1100)})
    run = run_of(client)
    assert len(run.data.params) == 250
    assert len(run.data.metrics) == 1100
    assert run.data.tags["t249"] == "249"


def test_nothing_to_log_opens_no_run(client: TrackingClient) -> None:
    client.log_params({})
    client.log_metrics({})
    client.set_tags({})
    assert client.run_id is None


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("log_metrics", {"loss": "low"}, "metric 'loss' must be a number, not 'low'"),
        ("log_metrics", {"loss": "1.5"}, "metric 'loss' must be a number"),
        ("log_metrics", {"loss": None}, "metric 'loss' must be a number"),
        ("log_metrics", {"loss": 10**400}, "metric 'loss' must be a number"),
        ("log_metrics", {1: 1}, "name of a metric must be text"),
        ("log_params", {"": 1}, "name of a parameter must be text"),
        ("log_params", {"long": "x" * 6001}, "'long' has 6001 characters"),
        ("set_tags", {"long": "x" * 8001}, "'long' has 8001 characters"),
        ("log_params", {"k" * 251: 1}, "exceeds the maximum length of 250"),
        ("log_params", [1], "logged as a dict"),
    ],
)
def test_bad_values_are_named_in_one_line(
    client: TrackingClient, method: str, values: Any, message: str
) -> None:
    with pytest.raises(TrackingError, match=message) as caught:
        getattr(client, method)(values)
    assert "\n" not in str(caught.value)


def test_artifacts_are_in_the_store(client: TrackingClient, tmp_path: Path) -> None:
    folder = tmp_path / "plots and tables"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    client.log_artifact(folder / "a.txt")
    client.log_artifact(str(folder / "a.txt"), "sub")
    client.log_artifacts(folder, "all")
    names = [file.path for file in mlflow_of(client).list_artifacts(client.run_id)]
    assert sorted(names) == ["a.txt", "all", "sub"]
    assert (tmp_path / "mlartifacts" / client.run_id / "artifacts" / "all" / "a.txt").exists()
    with pytest.raises(TrackingError, match="no file to log"):
        client.log_artifact(tmp_path / "missing")
    with pytest.raises(TrackingError, match="no folder to log"):
        client.log_artifacts(folder / "a.txt")
    with pytest.raises(TrackingError, match="could not log the artifact"):
        client.log_artifact(folder / "a.txt", "../../outside")


# Models


def test_a_module_is_logged_as_safetensors(client: TrackingClient) -> None:
    import mlx.core as mx
    from mlx import nn

    model = nn.Linear(4, 2)
    logged = client.log_model(model, "trained_model", tags={"kind": "toy"})
    folder = client.load_model_files(logged.model_id)
    assert sorted(file.name for file in folder.iterdir()) == [
        "MLmodel",
        "mlops-model.json",
        "model.safetensors",
    ]
    assert mx.array_equal(mx.load(str(folder / "model.safetensors"))["weight"], model.weight)

    found = mlflow_of(client).get_logged_model(logged.model_id)
    assert (found.name, found.status, found.source_run_id) == (
        "trained_model",
        "READY",
        client.run_id,
    )
    assert found.tags["kind"] == "toy"
    outputs = run_of(client).outputs.model_outputs
    assert [output.model_id for output in outputs] == [logged.model_id]
    assert "flavors: {}" in (folder / "MLmodel").read_text()


def test_a_checkpoint_is_logged_by_reference(client: TrackingClient, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "final")
    logged = client.log_model(checkpoint, "trained_model")
    assert logged.path == checkpoint
    assert client.load_model_files(client.run_id or "") == checkpoint
    kept = [f.path for f in mlflow_of(client).list_logged_model_artifacts(logged.model_id)]
    assert kept == ["MLmodel"]
    assert mlflow_of(client).get_logged_model(logged.model_id).tags == {
        "mlops.path": str(checkpoint),
        "mlops.files_digest": logged.digest,
        "mlflow.model.isExternal": "true",
    }
    (checkpoint / "model.safetensors").write_bytes(b"other")
    with pytest.raises(TrackingError, match="changed since trained_model was logged"):
        client.load_model_files(logged.model_id)


def test_a_checkpoint_is_copied_when_asked(client: TrackingClient, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "final")
    (checkpoint / "optimizer.pt").write_bytes(b"\x80\x04pickle")
    logged = client.log_model(str(checkpoint), "trained_model", copy=True)
    folder = client.load_model_files(logged.model_id)
    assert folder != checkpoint
    assert (folder / "sub" / "config.json").read_text() == "{}"
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert not (folder / "optimizer.pt").exists()


def write_checkpoint(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "sub" / "config.json").write_text("{}")
    return folder


def test_a_logged_model_can_be_registered(client: TrackingClient) -> None:
    logged = client.log_model({"w": np.ones(2)}, "trained_model")
    mlflow = mlflow_of(client)
    mlflow.create_registered_model("registered")
    location = mlflow.get_logged_model(logged.model_id).artifact_location
    version = mlflow.create_model_version(
        "registered", location, run_id=logged.run_id, model_id=logged.model_id
    )
    assert (int(version.version), version.status) == (1, "READY")


def test_models_that_cannot_be_logged_are_refused(client: TrackingClient) -> None:
    with pytest.raises(TrackingError, match="folder of a checkpoint"):
        client.log_model(object(), "trained_model")
    with pytest.raises(TrackingError, match="copy is for the folder"):
        client.log_model({"w": np.ones(2)}, "trained_model", copy=True)
    with pytest.raises(TrackingError, match="could not log the model 'a/b'"):
        client.log_model({"w": np.ones(2)}, "a/b")
    with pytest.raises(TrackingError, match="could not find a model"):
        client.load_model_files("m-0")
    with client.start_run() as run, pytest.raises(TrackingError, match="no model was logged"):
        client.load_model_files(run.run_id)


# Stores


def test_two_stores_in_one_process_stay_apart(client: TrackingClient, tmp_path: Path) -> None:
    import shutil

    import mlflow

    before = mlflow.get_tracking_uri()
    other_folder = tmp_path / "other"
    other_folder.mkdir()
    shutil.copy(tmp_path / "mlflow.db", other_folder)
    with create_client("p", tracking_uri=f"sqlite:///{other_folder}/mlflow.db") as other:
        other.log_param("where", "there")
        client.log_param("where", "here")
        other.log_model({"w": np.ones(2)}, "model")
    assert run_of(other).data.params == {"where": "there"}
    assert run_of(client).data.params == {"where": "here"}
    assert (other_folder / "mlartifacts").is_dir()
    assert not (tmp_path / "mlartifacts").exists()
    assert mlflow.get_tracking_uri() == before


def test_a_deleted_experiment_is_restored(store: Path) -> None:
    first = create_client("p")
    first.log_param("a", 1)
    first.close()
    experiment = run_of(first).info.experiment_id
    mlflow_of(first).delete_experiment(experiment)
    with create_client("p") as second:
        second.log_param("a", 2)
    assert run_of(second).info.experiment_id == experiment
    assert mlflow_of(second).get_experiment(experiment).lifecycle_stage == "active"


@pytest.mark.parametrize("kind", ["no folder", "no database", "dead server", "dead database"])
def test_a_store_that_is_down_is_one_clear_error(
    store: Path, dead_uri: str, kind: str, tmp_path: Path
) -> None:
    (tmp_path / "text.db").write_text("this is no database, but long enough to be one" * 20)
    uri = {
        "no folder": f"sqlite:///{tmp_path}/missing/mlflow.db",
        "no database": f"sqlite:///{tmp_path}/text.db",
        "dead server": dead_uri,
        "dead database": dead_uri.replace("http", "postgresql+psycopg2"),
    }[kind]
    client = create_client("p", tracking_uri=uri)
    with pytest.raises(TrackingError, match="cannot be used: .*MLFLOW_TRACKING_URI") as caught:
        client.log_param("a", 1)
    assert uri in str(caught.value)
    assert "\n" not in str(caught.value)


def test_errors_can_be_sent_to_another_process(client: TrackingClient) -> None:
    import pickle

    with pytest.raises(TrackingError) as caught:
        client.log_metric("loss", "low")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301
    assert json.dumps(str(caught.value))
