"""Publishing to S3 and fetching from it, as `moto` serves it on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bentoml
import boto3
import pytest
from moto.server import ThreadedMotoServer
from published_bento import TAG, Published

from mlops.errors import IntegrityError, PackagingError
from mlops.registry import ModelStore, resolve, shared, verify
from mlops.registry.location import Location

BUCKET = "team-models"
PLACE = f"s3://{BUCKET}/production"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty bucket that keeps every version of an object, so that a test sees every write."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = boto3.resource("s3").create_bucket(Bucket=BUCKET)
    bucket.Versioning().enable()
    yield bucket
    bucket.object_versions.delete()
    bucket.delete()


def writes(bucket: Any) -> list[str]:
    return [version.object_key for version in bucket.object_versions.all()]


@pytest.fixture
def pushed(bucket: Any, bentoml_home: Path, packaged: Published) -> Published:
    """What `packaged` holds, in the bucket, and an empty store."""
    place = str(packaged.place)
    for path in packaged.place.rglob("*"):
        if path.is_file():
            bucket.upload_file(str(path), f"production/{path.relative_to(place).as_posix()}")
    return packaged


def test_round_trip(pushed: Published, bucket: Any) -> None:
    before = sorted(writes(bucket))
    counted: list[int] = []
    shared.fetch(TAG, pushed.digest, PLACE, progress=counted.append)
    assert sum(counted) == sum(
        item.size for item in bucket.objects.filter(Prefix="production/blobs/")
    )
    for entry in ModelStore().list():
        verify(resolve(entry.reference))
    assert str(bentoml.bentos.get(TAG).tag) == TAG
    assert shared.publish(TAG, PLACE) == pushed.digest
    assert sorted(writes(bucket)) == before
    assert shared.publish(TAG, f"{PLACE}/again/") == pushed.digest
    assert sorted(writes(bucket)) == sorted(
        [*before, *(key.replace("production/", "production/again/") for key in before)]
    )


def test_large_files_go_in_parts(bucket: Any, bentoml_home: Path, tmp_path: Path) -> None:
    content = b"w" * 120_000_000
    (tmp_path / "weights").write_bytes(content)
    files = [("weights", tmp_path / "weights"), ("empty", tmp_path / "empty")]
    (tmp_path / "empty").write_bytes(b"")
    entry = ModelStore().save("big", "1", files, kind="language_model", framework="mlx")
    counted: list[int] = []
    digest = shared.publish("big:1", PLACE, progress=counted.append)
    assert sum(counted) == len(content)
    bentoml.models.delete("big:1")
    shared.fetch("big:1", digest, PLACE)
    ModelStore().verify(ModelStore().get("big:1"), entry.digest)


def test_tag_that_is_published_does_not_change(
    bucket: Any, bentoml_home: Path, tmp_path: Path
) -> None:
    (tmp_path / "weights").write_bytes(b"one")
    options: dict[str, Any] = {"kind": "language_model", "framework": "mlx"}
    ModelStore().save("demo", "1", [("weights", tmp_path / "weights")], **options)
    shared.publish("demo:1", PLACE)
    bentoml.models.delete("demo:1")
    (tmp_path / "weights").write_bytes(b"two")
    ModelStore().save("demo", "1", [("weights", tmp_path / "weights")], **options)
    before = writes(bucket)
    with pytest.raises(PackagingError, match=f"demo:1 is published at {PLACE} with other content"):
        shared.publish("demo:1", PLACE)
    assert writes(bucket) == before


def test_of_two_writers_of_an_index_the_first_wins(bucket: Any) -> None:
    place = Location(PLACE)
    place.create("index/demo/1.json", b"first", 0o444)
    place.create("index/demo/1.json", b"second", 0o444)
    assert b"".join(place.read("index/demo/1.json", 5)) == b"first"
    assert len(writes(bucket)) == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "lengthen", "delete"])
def test_damaged_blob(damage: str, pushed: Published, bucket: Any) -> None:
    blob = pushed.blob("model.safetensors")
    content = blob.read_bytes()
    changed = bucket.Object(f"production/blobs/{blob.name}")
    if damage == "delete":
        changed.delete()
    else:
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        changes = {"flip": flipped, "truncate": content[:-1], "lengthen": content + b"0"}
        changed.put(Body=changes[damage])
    with pytest.raises(IntegrityError, match=f"blobs/{blob.name}, for model.safetensors") as caught:
        shared.fetch(TAG, pushed.digest, PLACE)
    assert "\n" not in str(caught.value)
    assert ModelStore().list() == []
    assert not list(ModelStore().blobs.folder.iterdir())


def test_bucket_that_is_not_there(bucket: Any, bentoml_home: Path, tmp_path: Path) -> None:
    with pytest.raises(PackagingError, match=r"has no demo:1\.0\.0; publish it with `mlops push"):
        shared.fetch(TAG, None, PLACE)
    with pytest.raises(PackagingError, match="has no"):
        shared.fetch(TAG, None, "s3://nowhere/models")
    (tmp_path / "weights").write_bytes(b"w")
    ModelStore().save(
        "demo", "1", [("weights", tmp_path / "weights")], kind="language_model", framework="mlx"
    )
    with pytest.raises(PackagingError, match="cannot be used: .*bucket") as caught:
        shared.publish("demo:1", "s3://nowhere/models")
    assert "\n" not in str(caught.value)
