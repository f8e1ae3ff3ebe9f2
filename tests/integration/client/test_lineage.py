"""From a package to the runs that its adapters come from, and back, in a real MLflow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from bentoml_store import look_again
from mlops.cli import app
from mlops.client import TrackingClient, create_client, recall
from mlops.client.link_queue import LinkQueue, PackageLink
from mlops.client.weights import checkpoint_files, files_digest
from mlops.errors import TrackingError
from mlops.serving.bentoml.packager import package_model
from tiny_models import write_language_model, write_lora_adapter


@pytest.fixture
def client(store: Path) -> Iterator[TrackingClient]:
    client = create_client("project")
    look_again()
    yield client
    client.close()
    look_again()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return write_lora_adapter(base.parent / "adapter", base, base_reference=str(base))


def mlflow_of(client: TrackingClient) -> Any:
    import mlflow

    return mlflow.MlflowClient(tracking_uri=client.tracking_uri)


def tags_of(client: TrackingClient, run_id: str | None) -> dict[str, str]:
    tags: dict[str, str] = mlflow_of(client).get_run(run_id).data.tags
    return tags


def everything(client: TrackingClient) -> list[Any]:
    """All that MLflow keeps but the times."""
    mlflow = mlflow_of(client)
    ids = [experiment.experiment_id for experiment in mlflow.search_experiments()]
    runs = [mlflow.get_run(run.info.run_id) for run in mlflow.search_runs(ids)]
    return [
        *((run.info.run_id, run.data.tags, run.data.params) for run in runs),
        *(sorted(m.model_id for m in run.inputs.model_inputs) for run in runs),
        *((model.model_id, model.tags) for model in mlflow.search_logged_models(ids)),
    ]


def write_files(folder: Path, content: bytes = b"weights") -> Path:
    folder.mkdir()
    (folder / "adapters.safetensors").write_bytes(content)
    return folder


def result_with(adapter: Path, **more: str) -> dict[str, Any]:
    """A packaging result with one adapter."""
    part = {
        "tag": "base-tone:1",
        "digest": "sha256:" + "a" * 64,
        "files_digest": files_digest(checkpoint_files(adapter)),
        **more,
    }
    return {"model_tag": "base:1", "bento_tag": "svc:1", "parts": {"adapter.tone": part}}


def test_a_packaged_adapter_leads_to_its_run_and_back(
    client: TrackingClient, base: Path, adapter: Path
) -> None:
    with client.start_run("train tone") as training:
        logged = client.log_model(adapter, "tone")
    with client.start_run("package") as packaging:
        result = package_model(
            base,
            "demo",
            "project",
            build_bento=False,
            adapters={"tone": adapter},
            tracking=client,
        )
    tag, model_tag = result["adapter_tags"]["tone"], result["model_tag"]
    digest = result["parts"]["adapter.tone"]["digest"]

    tags = tags_of(client, packaging.run_id)
    assert tags["adapter.tone"] == f"{tag}@{digest}"
    assert tags["adapter.tone.run_id"] == training.run_id
    assert f"runs/{training.run_id}" in tags["mlflow.note.content"]
    inputs = mlflow_of(client).get_run(packaging.run_id).inputs.model_inputs
    assert [given.model_id for given in inputs] == [logged.model_id]

    tags = tags_of(client, training.run_id)
    assert tags["package." + model_tag.replace(":", ".")] == packaging.run_id
    assert f"runs/{packaging.run_id}" in tags["mlflow.note.content"]
    assert tag in tags["mlflow.note.content"]
    model_tags = mlflow_of(client).get_logged_model(logged.model_id).tags
    assert (model_tags["model_tag"], model_tags["model_digest"]) == (tag, digest)
    assert client.runs_of(tag) == [training.run_id]
    assert client.source_run(adapter) == training.run_id

    before = everything(client)
    again = package_model(
        base, "demo", "project", build_bento=False, adapters={"tone": adapter}, tracking=client
    )
    assert again["tracking"] == result["tracking"]
    assert client.active_run_id is None
    assert everything(client) == before

    shown = CliRunner().invoke(app, ["models", "show", tag])
    assert (
        f"comes from       run {training.run_id} (train tone), experiment project" in shown.output
    )
    assert f"packaged by      run {packaging.run_id} (package)" in shown.output
    assert client.tracking_uri in shown.output
    runs = json.loads(CliRunner().invoke(app, ["models", "show", tag, "--json"]).output)["runs"]
    assert [run["run_id"] for run in runs] == [training.run_id, packaging.run_id]


def test_an_adapter_packaged_in_its_run_is_traced_from_a_later_package(
    client: TrackingClient, base: Path, adapter: Path
) -> None:
    """Nothing was logged with `log_model`: the digest of the stored adapter leads to the run."""
    with client.start_run("train") as training:
        alone = package_model(
            adapter, "tone", "project", base_model=base, build_bento=False, tracking=client
        )
    tags = tags_of(client, training.run_id)
    assert tags["base_model"].startswith(f"{alone['base_model_tag']}@sha256:")
    result = package_model(
        base,
        "demo",
        "project",
        build_bento=False,
        adapters={"tone": alone["model_tag"]},
        tracking=client,
    )
    assert tags_of(client, result["tracking"].run_id)["adapter.tone.run_id"] == training.run_id


def test_a_label_names_the_run(client: TrackingClient, base: Path, adapter: Path) -> None:
    with client.start_run("elsewhere") as training:
        pass
    alone = package_model(
        adapter,
        "tone",
        base_model=base,
        build_bento=False,
        labels={"mlflow_run_id": training.run_id},
    )
    link = package_model(
        base, "demo", build_bento=False, adapters={"tone": alone["model_tag"]}, tracking=client
    )["tracking"]
    assert tags_of(client, link.run_id)["adapter.tone.run_id"] == training.run_id


def test_a_label_that_names_no_run_costs_no_link(
    client: TrackingClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    link = client.link_package(result_with(write_files(tmp_path / "a"), run_id="0" * 32))
    assert link.linked
    assert "adapter.tone.run_id" not in tags_of(client, link.run_id)
    assert "names the run 0000" in caplog.text


def test_runs_of_other_projects_are_found_and_deleted_ones_are_not(
    client: TrackingClient, tmp_path: Path
) -> None:
    files = write_files(tmp_path / "a")
    runs = []
    for project in ("first", "second", "third"):
        with create_client(project) as other:
            other.log_model(files, "tone", copy=True)
            runs.append(other.run_id)
    mlflow_of(client).delete_run(runs[0])
    link = client.link_package(result_with(files))
    assert tags_of(client, link.run_id)["adapter.tone.run_id"] == runs[1]
    assert client.source_run(write_files(tmp_path / "b", b"other")) is None


def test_notes_of_people_stay(client: TrackingClient, tmp_path: Path) -> None:
    files = write_files(tmp_path / "a")
    with client.start_run() as training:
        client.log_model(files, "tone")
        client.set_tag("mlflow.note.content", "Learning rate too high?")
    for bento_tag in ("svc:1", "svc:2", "svc:2"):
        client.link_package({**result_with(files), "bento_tag": bento_tag})
    first, blank, *lines = tags_of(client, training.run_id)["mlflow.note.content"].splitlines()
    assert (first, blank, len(lines)) == ("Learning rate too high?", "", 2)
    client.set_tag("x", 1)
    with client.start_run() as crowded:
        client.log_model(write_files(tmp_path / "b", b"other"), "tone")
        client.set_tag("mlflow.note.content", "x" * 7990)
    client.link_package(result_with(tmp_path / "b"))
    tags = tags_of(client, crowded.run_id)
    assert tags["mlflow.note.content"] == "x" * 7990
    assert "package.svc.1" in tags


def test_a_link_that_waited_tells_both_runs(
    client: TrackingClient, tmp_path: Path, dead_uri: str
) -> None:
    files = write_files(tmp_path / "a")
    with client.start_run() as training:
        client.log_model(files, "tone")
    result = result_with(files)
    assert create_client("project", tracking_uri=dead_uri).link_package(result).queued
    [waiting] = LinkQueue().waiting()
    LinkQueue().remove([waiting])
    LinkQueue().add(PackageLink(client.tracking_uri, "project", None, waiting.facts, waiting.parts))
    assert client.flush_queue().sent == 1
    run_id = tags_of(client, training.run_id)["package.svc.1"]
    assert tags_of(client, run_id)["adapter.tone.run_id"] == training.run_id
    relations = [(run.relation, run.run_id) for run in recall("sha256:" + "a" * 64)]
    assert relations == [("comes from", training.run_id), ("packaged by", run_id)]


def test_an_mlflow_elsewhere_is_asked_when_nothing_was_linked_here(
    client: TrackingClient,
    base: Path,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    dead_uri: str,
) -> None:
    with client.start_run("train tone") as training:
        client.log_model(adapter, "tone")
    tag = package_model(adapter, "tone", base_model=base, build_bento=False)["model_tag"]

    def show() -> Any:
        return CliRunner().invoke(app, ["models", "show", tag])

    assert "run" not in show().output
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    assert f"comes from       run {training.run_id} (train tone)" in show().output
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead_uri)
    shown = show()
    assert (shown.exit_code, "cannot be used" in shown.stderr) == (0, True)
    assert "adapters.safetensors" in shown.stdout
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///new.db")
    assert "no MLflow store" in show().stderr
    assert not Path("new.db").exists()


def test_the_data_of_a_run(client: TrackingClient, tmp_path: Path) -> None:
    folder = tmp_path / "data of mine"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a"}\n')
    client.log_input(folder / "train.jsonl")
    client.log_input(folder, "chats", context="evaluation")
    client.log_input(str(folder), "chats", context="evaluation")
    import mlflow.data

    client.log_input(mlflow.data.from_numpy(np.ones(3), name="ones"))
    given = mlflow_of(client).get_run(client.run_id).inputs.dataset_inputs
    found = {one.dataset.name: (one.tags[0].value, one.dataset) for one in given}
    assert {name: context for name, (context, _) in found.items()} == {
        "train.jsonl": "training",
        "chats": "evaluation",
        "ones": "training",
    }
    chats = found["chats"][1]
    assert json.loads(chats.source) == {"uri": str(folder)}
    assert json.loads(chats.profile)["size_bytes"] == 14
    (folder / "train.jsonl").write_text('{"text": "b"}\n')
    client.log_input(folder, "chats")
    assert len(mlflow_of(client).get_run(client.run_id).inputs.dataset_inputs) == 4
    with pytest.raises(TrackingError, match="no data at"):
        client.log_input(tmp_path / "missing")
    with pytest.raises(TrackingError, match="a file, a folder, or a dataset of mlflow.data"):
        client.log_input([1, 2])
