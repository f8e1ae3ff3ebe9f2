"""The command that serves is killed, ends before it serves, or is told what makes no sense."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving_process import BENTOML, MLOPS, ServingProcess

import tiny_models
from bentoml_store import look_again
from live_server import wait_for
from mlops.serving.bentoml.packager import package_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model, its Bento `tiny:1.0.0` in the store `home`, and `tmp` for temporary files."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "tmp").mkdir()
    tiny_models.write_language_model(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENTOML_HOME", str(folder / "home"))
        look_again()
        package_model(folder / "model", "tiny", model_version="1.0.0")
    look_again()
    return folder


@pytest.fixture
def temporary(folder: Path) -> Iterator[Path]:
    """Where commands keep what is gone when they end."""
    yield folder / "tmp"
    assert not list((folder / "tmp").glob("mlops-*"))


def test_workers_end_with_a_command_that_was_killed(folder: Path, temporary: Path) -> None:
    command = [*BENTOML, "serve", "tiny:1.0.0", "--workers", "2"]
    with ServingProcess(command, folder, folder / "home", TMPDIR=str(temporary)) as server:
        server.wait_until_ready()
        assert len(server.workers()) == 2
        server.process.kill()
        server.process.wait()
        wait_for(lambda: not server.left_over())


def test_sigterm_before_it_serves_leaves_nothing(folder: Path, temporary: Path) -> None:
    command = [*MLOPS, "serve", "model"]
    with ServingProcess(command, folder, folder / "home", TMPDIR=str(temporary)) as server:
        wait_for(lambda: list(temporary.glob("mlops-service-*")))
        server.stop(signal.SIGTERM)


def test_a_wrong_setting_is_named_for_a_bento_too(folder: Path, temporary: Path) -> None:
    command, more = [*BENTOML, "serve", "tiny:1.0.0"], {"MLOPS_MAX_BATCH_SIZE": "abc"}
    with ServingProcess(command, folder, folder / "home", TMPDIR=str(temporary), **more) as server:
        assert server.wait() == 1
        assert "MLOPS_MAX_BATCH_SIZE = 'abc' is not allowed" in server.told()


def test_a_foreign_address_is_named(folder: Path, temporary: Path) -> None:
    command = [*BENTOML, "serve", "tiny:1.0.0", "--host", "192.0.2.1"]
    with ServingProcess(command, folder, folder / "home", TMPDIR=str(temporary)) as server:
        assert server.wait() == 1
        assert "192.0.2.1 is no address of this machine" in server.told()
