"""What deleted models and killed commands leave, here and at a shared place, and how it goes."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import bentoml
import pytest
from typer.testing import CliRunner

from mlops.cli import app
from mlops.errors import PackagingError
from mlops.registry import ModelStore, shared
from mlops.registry.location import ABANDONED_AFTER_S, Location


def save(tag: str, folder: Path, content: bytes) -> None:
    folder.mkdir()
    (folder / "weights").write_bytes(content)
    name, _, version = tag.partition(":")
    files = [("weights", folder / "weights")]
    ModelStore().save(name, version, files, kind="language_model", framework="mlx")


def mlops(*arguments: str) -> str:
    """What a terminal shows: the result, and what is told beside it."""
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def files_under(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() and "lock" not in path.name}


def test_bytes_of_a_deleted_model_are_told_and_freed(bentoml_home: Path, tmp_path: Path) -> None:
    save("one:1", tmp_path / "one", b"w" * 2**20)
    save("two:1", tmp_path / "two", b"w" * 2**20)
    assert "reclaimable" not in mlops("models", "list")
    bentoml.models.delete("one:1")
    assert "reclaimable" not in mlops("models", "list"), "the other one has the same content"
    bentoml.models.delete("two:1")
    (bentoml_home / "mlops" / "blobs" / "partial-killed").write_bytes(b"w" * 2**19)
    staged = bentoml_home / "mlops" / "staging" / "killed"
    staged.mkdir(parents=True)
    (staged / "latest").write_bytes(b"w" * 2**19)
    assert mlops("models", "list").splitlines()[-1] == "2.0 MB reclaimable: `mlops gc` frees them"
    before = files_under(bentoml_home)
    assert mlops("gc", "--dry-run") == "would free 2.0 MB in 3 files\n"
    assert files_under(bentoml_home) == before
    freed = json.loads(mlops("gc", "--json"))
    assert freed == {"num_files": 3, "num_bytes": 2 * 2**20, "dry_run": False}
    assert files_under(bentoml_home) == set()
    assert mlops("gc") == "nothing to free\n"
    assert "reclaimable" not in mlops("models", "list")


def test_what_models_use_stays(bentoml_home: Path, tmp_path: Path) -> None:
    save("one:1", tmp_path / "one", b"one")
    save("two:1", tmp_path / "two", b"two")
    bentoml.models.delete("one:1")
    assert mlops("gc") == "freed 0.0 MB in 1 file\n"
    ModelStore().verify(ModelStore().get("two:1"))
    assert len(list((bentoml_home / "mlops" / "blobs").iterdir())) == 1


@pytest.mark.parametrize("arguments", [["gc"], ["gc", "--dry-run"]])
def test_garbage_is_left_alone_while_another_writes(
    arguments: list[str], bentoml_home: Path, tmp_path: Path
) -> None:
    save("one:1", tmp_path / "one", b"w")
    bentoml.models.delete("one:1")
    before = files_under(bentoml_home)
    with (bentoml_home / "mlops" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        done = CliRunner().invoke(app, arguments)
        assert isinstance(done.exception, PackagingError)
        assert "another command writes to the store" in str(done.exception)
        assert "reclaimable" not in mlops("models", "list")
    assert files_under(bentoml_home) == before


WRITER = textwrap.dedent("""
    import sys
    from mlops.registry.location import Location
    with Location(sys.argv[1])._unnamed("blobs/1-x") as (unnamed, writer):
        writer.write(b"half")
        writer.flush()
        print(unnamed, flush=True)
        sys.stdin.read()
""")


def begin_to_write(place: Path) -> tuple[subprocess.Popen[str], Path]:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    return writer, Path(writer.stdout.readline().strip())


def test_half_a_file_goes_when_its_writer_is_gone(tmp_path: Path) -> None:
    place = Location(str(tmp_path))
    writer, half = begin_to_write(tmp_path)
    long_ago = half.stat().st_mtime - 2 * ABANDONED_AFTER_S
    os.utime(half, (long_ago, long_ago))
    place.sweep()
    assert half.exists(), "it is being written, however slowly"
    writer.kill()
    writer.communicate()
    place.sweep()
    assert not half.exists()


@pytest.mark.parametrize(
    ("name", "age_s", "stays"),
    [
        (f"partial-{'0' * 32}@elsewhere", ABANDONED_AFTER_S - 60, True),
        (f"partial-{'0' * 32}@elsewhere", ABANDONED_AFTER_S + 60, False),
        (f"partial-{'0' * 32}", ABANDONED_AFTER_S + 60, False),  # of an earlier version
        ("partial-model.json", 10 * ABANDONED_AFTER_S, True),
    ],
)
def test_half_a_file_of_another_machine_goes_by_its_age(
    name: str, age_s: float, stays: bool, bentoml_home: Path, tmp_path: Path
) -> None:
    save("demo:1", tmp_path / "m", b"w")
    half = tmp_path / "place" / "index" / "other" / name
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    then = half.stat().st_mtime - age_s
    os.utime(half, (then, then))
    shared.publish("demo:1", str(tmp_path / "place"))
    assert half.exists() == stays


def test_blob_published_for_few_is_published_again_for_more(
    bentoml_home: Path, tmp_path: Path
) -> None:
    save("private:1", tmp_path / "private", b"w")
    bentoml.models.delete("private:1")
    (tmp_path / "private" / "weights").chmod(0o600)
    files = [("weights", tmp_path / "private" / "weights")]
    ModelStore().save("private", "1", files, kind="language_model", framework="mlx")
    save("public:1", tmp_path / "public", b"w")
    modes = []
    for tag in ("private:1", "public:1", "private:1"):
        shared.publish(tag, str(tmp_path / "place"))
        (blob,) = (tmp_path / "place" / "blobs").iterdir()
        modes.append(oct(blob.stat().st_mode & 0o777))
    assert modes == ["0o600", "0o644", "0o644"]
