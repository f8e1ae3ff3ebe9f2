"""Which files a checkpoint folder holds, and which it may not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlops.checkpoints import list_files
from mlops.checkpoints.files import MAX_DEPTH
from mlops.errors import PackagingError


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("content")
    return folder


def names(folder: Path, *include: str, exclude: tuple[str, ...] = ()) -> list[str]:
    return [file.relative_path for file in list_files(folder, include, exclude)]


def test_files_come_in_the_order_of_their_paths_with_their_sizes(tmp_path: Path) -> None:
    fill(tmp_path, "b.json", "sub/deep/c.json", "a.json", "sub.json")
    assert names(tmp_path) == ["a.json", "b.json", "sub.json", "sub/deep/c.json"]
    first = list_files(tmp_path)[0]
    assert (first.path, first.size) == ((tmp_path / "a.json").resolve(), len("content"))


def test_hidden_files_caches_and_litter_are_left_out(tmp_path: Path) -> None:
    fill(
        tmp_path, "keep.json", ".git/config", ".DS_Store", "__pycache__/a.pyc", "__MACOSX/a",
        "Thumbs.db", "sub/.cache/huggingface/a", "sub/desktop.ini",
    )  # fmt: skip
    assert names(tmp_path) == ["keep.json"]


def test_pickles_of_trainers_are_left_out(tmp_path: Path) -> None:
    fill(tmp_path, "optimizer.pt", "rng_state.pth", "keep.json")
    (tmp_path / "training_args.bin").write_bytes(b"\x80\x04\x95rest")
    (tmp_path / "tokenizer.bin").write_bytes(b"\x80\x02\x00\x00 a table, not a pickle")
    assert names(tmp_path) == ["keep.json", "tokenizer.bin"]


def test_a_single_file_lists_itself(tmp_path: Path) -> None:
    fill(tmp_path, "model.onnx")
    assert names(tmp_path / "model.onnx") == ["model.onnx"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.json", ["a.json", "logs/b.json", "logs/old/c.json"]),
        ("**/*.json", ["a.json", "logs/b.json", "logs/old/c.json"]),
        ("**/*", ["a.json", "logs/b.json", "logs/old/c.json", "logs/run.txt", "w.safetensors"]),
        ("/*.json", ["a.json"]),
        ("./*.json", ["a.json"]),
        ("logs", ["logs/b.json", "logs/old/c.json", "logs/run.txt"]),
        ("logs/", ["logs/b.json", "logs/old/c.json", "logs/run.txt"]),
        ("logs/*.json", ["logs/b.json"]),
        ("logs/**", ["logs/b.json", "logs/old/c.json", "logs/run.txt"]),
        ("logs/**/c.json", ["logs/old/c.json"]),
        ("logs/**/b.json", ["logs/b.json"]),
        ("**/old/**", ["logs/old/c.json"]),
        ("?.json", ["a.json", "logs/b.json", "logs/old/c.json"]),
        ("[ab].json", ["a.json", "logs/b.json"]),
        ("nothing", []),
        ("", []),
    ],
)
def test_globs(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    fill(tmp_path, "a.json", "logs/b.json", "logs/old/c.json", "logs/run.txt", "w.safetensors")
    assert names(tmp_path, pattern) == expected
    everything = names(tmp_path)
    rest = [name for name in everything if name not in expected]
    assert names(tmp_path, exclude=(pattern,)) == rest


def test_exclude_wins_over_include(tmp_path: Path) -> None:
    fill(tmp_path, "a.json", "b.json")
    assert names(tmp_path, "*.json", exclude=("b.*",)) == ["a.json"]


def test_a_link_within_the_folder_is_followed(tmp_path: Path) -> None:
    fill(tmp_path, "blobs/weights")
    (tmp_path / "model.safetensors").symlink_to("blobs/weights")
    found = {file.relative_path: file.path for file in list_files(tmp_path)}
    assert found["model.safetensors"] == (tmp_path / "blobs/weights").resolve()


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "secret", "model/config.json")
    (tmp_path / "model/tokenizer.json").symlink_to("../secret")
    with pytest.raises(PackagingError, match=r"tokenizer\.json is a link that leads out") as caught:
        list_files(tmp_path / "model")
    assert caught.value.details["file"] == "tokenizer.json"
    assert caught.value.details["target"] == str((tmp_path / "secret").resolve())


def test_a_link_to_a_folder_outside_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "other/secret", "model/config.json")
    (tmp_path / "model/sub").symlink_to(tmp_path / "other")
    with pytest.raises(PackagingError, match="leads out of the folder"):
        list_files(tmp_path / "model")


@pytest.mark.parametrize("target", ["nowhere", "loop"])
def test_a_link_to_nowhere_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "loop").symlink_to(target)
    with pytest.raises(PackagingError, match="a link that leads nowhere"):
        list_files(tmp_path)


def hub_snapshot(cache: Path) -> Path:
    model = fill(cache / "models--org--name", "blobs/abc")
    (model / "snapshots/1234").mkdir(parents=True)
    (model / "snapshots/1234/config.json").symlink_to("../../blobs/abc")
    return model / "snapshots/1234"


def test_the_links_of_a_hub_snapshot_are_followed(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path)
    (file,) = list_files(snapshot)
    assert file.relative_path == "config.json"
    assert file.path == (tmp_path / "models--org--name/blobs/abc").resolve()


def test_a_hub_snapshot_may_not_link_elsewhere(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path)
    fill(tmp_path, "models--org--other/blobs/abc")
    (snapshot / "tokenizer.json").symlink_to("../../../models--org--other/blobs/abc")
    with pytest.raises(PackagingError, match="leads out of the folder"):
        list_files(snapshot)


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    fill(tmp_path, "checkpoint_2/config.json")
    (tmp_path / "latest").symlink_to("checkpoint_2")
    assert names(tmp_path / "latest") == ["config.json"]


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(PackagingError, match=r"config\.json is not a regular file"):
        list_files(tmp_path)


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.json")).write_text("{}")
    except OSError:
        pytest.skip("this file system takes text names only")
    with pytest.raises(PackagingError, match="not printable text") as caught:
        list_files(tmp_path)
    str(caught.value).encode("utf-8")


def test_a_name_with_a_newline_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "a\nRUN evil")
    with pytest.raises(PackagingError, match="not printable text"):
        list_files(tmp_path)


def test_folders_nested_without_end_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, "/".join(["d"] * (MAX_DEPTH + 1)) + "/file")
    with pytest.raises(PackagingError, match="nested more than"):
        list_files(tmp_path)


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlops.checkpoints.files.MAX_FILES", 3)
    fill(tmp_path, "a", "b", "c")
    assert len(list_files(tmp_path)) == 3
    fill(tmp_path, "d")
    with pytest.raises(PackagingError, match="more than 3 files"):
        list_files(tmp_path)
