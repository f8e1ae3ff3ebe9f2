"""One Ray cluster and one model store for all tests of this folder."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from bentoml_store import look_again
from ray_cluster import RayCluster, environment
from ray_services import build_waiting, package_tiny, write_models

END_OF_CLUSTER = pytest.StashKey[ExitStack]()


def _is_here(item: pytest.Item) -> bool:
    return Path(__file__).parent in Path(item.path).parents


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _is_here(item):
            # Ray's own threads, sockets and processes.
            for kind in ("ResourceWarning", "DeprecationWarning", "FutureWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{kind}"))
            item.add_marker(
                pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
            )


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models as folders, and the store."""
    folder = tmp_path_factory.mktemp("ray")
    write_models(folder)
    return folder


@pytest.fixture(scope="session")
def home(folder: Path) -> Path:
    """The model store of the driver and of both nodes."""
    home = folder / "bentoml"
    with environment(BENTOML_HOME=str(home)):
        look_again()
        package_tiny(folder, "1.0.0")
        package_tiny(folder, "1.1.0", max_batch_size=16)
        for version in ("1.0.0", "2.0.0", "3.0.0-broken"):
            build_waiting(folder, version)
    look_again()
    return home


@contextmanager
def _running_cluster(home: Path) -> Iterator[RayCluster]:
    import ray

    from mlops.serving.ray.cluster import SERVING_ENVIRONMENT

    # The test process has modules that a replica does not find by itself.
    with environment(BENTOML_HOME=str(home), RAY_USAGE_STATS_ENABLED="0", **SERVING_ENVIRONMENT):
        cluster = RayCluster(home)
        ray.init(cluster.address, log_to_driver=False, logging_level="error")
        try:
            yield cluster
        finally:
            cluster.close()


@pytest.fixture(scope="session")
def started_cluster(request: pytest.FixtureRequest, home: Path) -> RayCluster:
    end = ExitStack()
    cluster = end.enter_context(_running_cluster(home))
    request.session.stash[END_OF_CLUSTER] = end
    return cluster


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, Any, Any]:
    """End the cluster with the last test here: it would take cores from the tests that follow."""
    try:
        return (yield)
    finally:
        if nextitem is None or not _is_here(nextitem):
            item.session.stash.get(END_OF_CLUSTER, ExitStack()).close()


@pytest.fixture
def cluster(
    started_cluster: RayCluster, home: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RayCluster]:
    """The cluster, with its store as this process's."""
    monkeypatch.setenv("BENTOML_HOME", str(home))
    look_again()
    yield started_cluster
    look_again()
