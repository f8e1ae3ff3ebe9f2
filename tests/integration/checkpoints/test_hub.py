"""Models of the Hugging Face Hub: from the cache without a network, or one clear sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlops.checkpoints.hub import looks_like_hub_id
from tiny_models import write_language_model

REVISION = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
import json, sys
from mlops.checkpoints import hub, recognise
from mlops.errors import PackagingError
try:
    snapshot = hub.download(*sys.argv[1:])
    answer = {"revision": snapshot.revision, "is": recognise(snapshot.path).description}
except PackagingError as error:
    answer = {"error": error.message, "operation": error.operation, "details": error.details}
print(json.dumps(answer))
"""


def ask(home: Path, *arguments: str, **environment: str) -> dict[str, object]:
    """What `download` says in a process of its own: the hub's library reads its settings once."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "HF_HOME": str(home),
            "NO_PROXY": "127.0.0.1",
            **environment,
        },
    )
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """A cache that holds org/tiny, as a download leaves it: files in blobs, links in snapshots."""
    model = tmp_path / "hub" / "models--org--tiny"
    blobs, snapshot = model / "blobs", model / "snapshots" / REVISION
    write_language_model(blobs)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(blobs.iterdir())):
        file.rename(blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(REVISION)
    return tmp_path


@pytest.mark.parametrize("revision", [[], ["main"], [REVISION]])
def test_a_cached_model_needs_no_network(hub_cache: Path, revision: list[str]) -> None:
    answer = ask(hub_cache, "org/tiny", *revision, HF_HUB_OFFLINE="1")
    assert answer["revision"] == REVISION
    assert str(answer["is"]).startswith("a llama language model")


def test_a_cached_model_is_found_when_the_hub_cannot_be_reached(hub_cache: Path) -> None:
    answer = ask(hub_cache, "org/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert answer["revision"] == REVISION


@pytest.mark.parametrize(
    "environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}]
)
def test_no_network_is_one_clear_sentence(tmp_path: Path, environment: dict[str, str]) -> None:
    answer = ask(tmp_path, "org/absent", **environment)
    assert "org/absent is not in the local cache and could not be downloaded" in str(
        answer["error"]
    )
    assert "pass the folder" in str(answer["error"])
    assert answer["operation"] == "download"
    assert answer["details"] == {"path": "org/absent", "hub_id": "org/absent", "revision": None}


def test_a_name_that_is_no_hub_id_is_refused(tmp_path: Path) -> None:
    assert "is not a Hugging Face id" in str(ask(tmp_path, "a/b/c", HF_HUB_OFFLINE="1")["error"])


@pytest.mark.parametrize("text", ["org/name", "mlx-community/Qwen3-0.6B-4bit", "a/b", "_a/_b.c"])
def test_hub_ids(text: str) -> None:
    assert looks_like_hub_id(text)


@pytest.mark.parametrize(
    "text", ["name", "/abs/path", "./a", "../a", "a/b/c", "a/", "/a", "a/b c", "a/b\n", "a/..b", ""]
)
def test_texts_that_are_no_hub_ids(text: str) -> None:
    assert not looks_like_hub_id(text)
