"""The file of links that wait for MLflow."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from mlops.client.link_queue import LinkQueue, PackageLink, read_facts, read_parts
from mlops.errors import TrackingError


def link(number: int = 1) -> PackageLink:
    return PackageLink("http://mlflow.test", "project", None, {"model_tag": f"model:{number}"})


@pytest.fixture
def queue(tmp_path: Path) -> LinkQueue:
    return LinkQueue(tmp_path / "mlops" / "queue.jsonl")


def test_links_come_back_in_their_order(queue: LinkQueue) -> None:
    for number in (3, 1, 2):
        queue.add(link(number))
    assert queue.waiting() == [link(3), link(1), link(2)]
    queue.remove([link(1)])
    assert queue.waiting() == [link(3), link(2)]


def test_the_same_link_waits_once(queue: LinkQueue) -> None:
    queue.add(link())
    queue.add(link())
    assert queue.waiting() == [link()]


def test_an_empty_queue_has_no_file(queue: LinkQueue) -> None:
    assert queue.waiting() == []
    assert not queue.path.exists()


def test_the_file_is_for_its_owner_alone(queue: LinkQueue) -> None:
    queue.add(link(1))
    queue.add(link(2))
    queue.remove([link(1)])
    assert queue.path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "damaged",
    [
        b"{",
        b"\xff\xfe\n",
        b"null\n",
        b"[" * 100_000 + b"\n",
        b'{"facts": {}, "project_name": "p", "run_id": null, "tracking_uri": "u"}\n',
        b'{"facts": {"model_tag": 1}, "project_name": "p", "run_id": null, "tracking_uri": "u"}\n',
        b'{"facts": {"model_tag": "a:1"}, "project_name": 5, "run_id": null, "tracking_uri": ""}\n',
    ],
)
def test_a_damaged_line_costs_no_link(queue: LinkQueue, damaged: bytes) -> None:
    queue.add(link(1))
    with queue.path.open("ab") as file:
        file.write(damaged)
    queue.add(link(2))
    assert queue.waiting() == [link(1), link(2)]
    assert damaged.strip() in queue.rejected_path.read_bytes()
    assert len(queue.path.read_bytes().splitlines()) == 2


def test_an_oversized_queue_is_refused(queue: LinkQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlops.client.link_queue.MAX_QUEUE_BYTES", 200)
    queue.add(link(1))
    with pytest.raises(OSError, match="full"):
        for number in range(2, 9):
            queue.add(link(number))
    assert queue.waiting()[0] == link(1)


def add_many(path: Path, first: int) -> None:
    for number in range(first, first + 20):
        LinkQueue(path).add(link(number))


def test_processes_lose_no_link(queue: LinkQueue) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=add_many, args=(queue.path, 100 * i)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    expected = {f"model:{100 * i + number}" for i in range(3) for number in range(20)}
    assert {waiting.facts["model_tag"] for waiting in queue.waiting()} == expected


def test_one_sender_at_a_time(queue: LinkQueue) -> None:
    with queue.sending() as first, queue.sending() as second:
        assert (first, second) == (True, False)
    with queue.sending() as again:
        assert again


def test_the_default_file_is_in_the_bentoml_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path))
    LinkQueue().add(link())
    content = (tmp_path / "mlops" / "tracking-queue.jsonl").read_text()
    assert json.loads(content)["facts"] == {"model_tag": "model:1"}


def test_facts_are_what_a_link_needs_of_a_packaging_result() -> None:
    result = {"success": True, "model_tag": "a:1", "bento_tag": None, "files": [1, 2]}
    assert read_facts(result) == {"model_tag": "a:1"}


@pytest.mark.parametrize(
    "result",
    [None, "a:1", {}, {"model_tag": None}, {"model_tag": 3}, {"model_tag": "a\nb"},
     {"model_tag": "a:1", "model_digest": "x" * 2000}],
)  # fmt: skip
def test_no_packaging_result_is_misuse(result: object) -> None:
    with pytest.raises(TrackingError, match=r"packaging result"):
        read_facts(result)  # type: ignore[arg-type]


DIGEST = "sha256:" + "0" * 64


def test_parts_come_back(queue: LinkQueue) -> None:
    parts = {"adapter.tone": {"tag": "a:1", "digest": DIGEST, "run_id": "7"}}
    assert read_parts({"parts": parts}) == parts
    assert read_parts({}) == {}
    with_parts = PackageLink("http://mlflow.test", "p", None, {"model_tag": "m:1"}, parts)
    queue.add(with_parts)
    assert queue.waiting() == [with_parts]


def test_links_of_an_earlier_version_have_no_parts(queue: LinkQueue) -> None:
    queue.add(link())
    line = json.loads(queue.path.read_text())
    del line["parts"]
    queue.path.write_text(json.dumps(line) + "\n")
    assert queue.waiting() == [link()]


@pytest.mark.parametrize(
    "parts",
    [
        [1],
        {"model": "a:1"},
        {"model": {"tag": "a:1"}},
        {"model": {"tag": "a:1", "digest": "../../x"}},
        {"model": {"tag": "a:1", "digest": DIGEST, "files_digest": "' OR 1=1"}},
        {"model": {"tag": 1, "digest": DIGEST}},
        {"other": {"tag": "a:1", "digest": DIGEST}},
    ],
)
def test_no_parts_of_a_packaging_result_are_misuse(parts: object) -> None:
    with pytest.raises(TrackingError, match="packaging result"):
        read_parts({"parts": parts})
