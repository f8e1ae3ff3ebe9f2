"""Which of several sets of weights is the model; that none is merged or taken in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlops.checkpoints import Checkpoint, recognise
from mlops.errors import PackagingError
from plain_llama import llama_shapes, write_index, write_llama, write_shards
from tiny_models import write_safetensors

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def refused(folder: Path, *parts: str) -> str:
    with pytest.raises(PackagingError) as caught:
        recognise(folder)
    for part in parts:
        assert part in caught.value.message
    return caught.value.message


def warned(found: Checkpoint, *parts: str) -> None:
    (warning,) = found.warnings
    for part in parts:
        assert part in warning


def test_nothing_is_said_of_a_plain_model(tmp_path: Path) -> None:
    for number, folder in enumerate(
        [
            write_llama(tmp_path / "one"),
            write_llama(tmp_path / "two", num_shards=2),
            write_llama(tmp_path / "three", num_shards=2, with_index=True),
            write_llama(tmp_path / "four", with_index=True),
        ]
    ):
        found = recognise(folder)
        assert (found.warnings, found.left_out) == ((), ())
        assert set(found.weight_files) <= set(found.files)
        assert (INDEX in found.files) == (number >= 2)


@pytest.mark.parametrize(
    "stray",
    [
        "model-fp16", "model.fp16", "model_old", "consolidated", "weights", "optimizer",
        "pytorch_model", "model-00001-of-00003", "pytorch_model-00001-of-00002",
        "model.fp16-00001-of-00002",
    ],
)  # fmt: skip
def test_weights_that_the_index_does_not_name_are_left_out(tmp_path: Path, stray: str) -> None:
    write_llama(tmp_path, num_shards=2, with_index=True)
    write_shards(tmp_path, stray, 1, fill=7)
    found = recognise(tmp_path)
    assert found.weight_files == SHARDS
    assert found.left_out == (f"{stray}.safetensors",)
    warned(found, f"{stray}.safetensors left out", f"those that {INDEX} names")


@pytest.mark.parametrize("stray", ["model-fp16", "model.fp16", "model_old", "consolidated"])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_without_an_index_the_usual_name_wins(tmp_path: Path, num_shards: int, stray: str) -> None:
    write_llama(tmp_path, num_shards=num_shards)
    write_shards(tmp_path, stray, 1, fill=7)
    found = recognise(tmp_path)
    assert found.weight_files == (("model.safetensors",) if num_shards == 1 else SHARDS)
    warned(found, f"{stray}.safetensors left out")


def test_a_stray_file_is_not_even_opened(tmp_path: Path) -> None:
    write_llama(tmp_path)
    (tmp_path / "model_old.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    (tmp_path / "model-half.safetensors").symlink_to("/nowhere")
    assert recognise(tmp_path).weight_files == ("model.safetensors",)


@pytest.mark.parametrize("with_index", [True, False])
def test_one_file_beside_whole_shards_cannot_be_told_from_the_model(
    tmp_path: Path, with_index: bool
) -> None:
    """transformers would take the one file, whatever the index says; mlx-lm would merge them."""
    write_llama(tmp_path, num_shards=2, with_index=with_index)
    write_shards(tmp_path, "model", 1, fill=7)
    refused(tmp_path, "two sets of weights", "model.safetensors", SHARDS[0], "move one")


def test_one_file_with_other_tensors_is_not_the_model(tmp_path: Path) -> None:
    write_llama(tmp_path, num_shards=2, with_index=True)
    write_safetensors(tmp_path / "model.safetensors", {"vision.proj.weight": (4, 4)})
    found = recognise(tmp_path)
    assert found.weight_files == SHARDS
    warned(found, "model.safetensors left out")


def test_one_file_that_is_cut_off_is_not_the_model(tmp_path: Path) -> None:
    write_llama(tmp_path, num_shards=2, with_index=True)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert recognise(tmp_path).weight_files == SHARDS


@pytest.mark.parametrize("num_shards", [1, 2])
def test_an_index_of_another_build_is_left_out(tmp_path: Path, num_shards: int) -> None:
    write_llama(tmp_path, num_shards=num_shards)
    old = {f"{name}_old": "model-00001-of-00007.safetensors" for name in llama_shapes()}
    write_index(tmp_path, old)
    found = recognise(tmp_path)
    assert len(found.weight_files) == num_shards
    assert INDEX not in found.files
    assert found.left_out == (INDEX,)
    warned(found, "model-00001-of-00007.safetensors", "another build")


def test_an_index_with_more_tensors_than_are_there_is_an_unfinished_download(
    tmp_path: Path,
) -> None:
    write_llama(tmp_path)
    some = dict(list(llama_shapes().items())[:5])
    write_safetensors(tmp_path / "model.safetensors", some)
    write_index(tmp_path, dict.fromkeys(llama_shapes(), "model-00001-of-00004.safetensors"))
    refused(tmp_path, "model-00001-of-00004.safetensors is missing", "download it again")


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_missing_shard_is_named(tmp_path: Path, with_index: bool, lost: int) -> None:
    write_llama(tmp_path, num_shards=2, with_index=with_index)
    (tmp_path / SHARDS[lost]).unlink()
    refused(tmp_path, f"{SHARDS[lost]} is missing", "download it again")


def test_shards_of_two_builds_without_an_index_are_refused(tmp_path: Path) -> None:
    write_llama(tmp_path, num_shards=2)
    write_shards(tmp_path, "model", 3)
    refused(tmp_path, "shards of 2 sets", SHARDS[0], "model-00001-of-00003.safetensors")
    write_index(tmp_path, dict.fromkeys(llama_shapes(), SHARDS[0]))
    refused(tmp_path, "not in their files")


def test_shards_of_two_builds_with_an_index(tmp_path: Path) -> None:
    write_llama(tmp_path, num_shards=2, with_index=True)
    write_shards(tmp_path, "model", 3)
    found = recognise(tmp_path)
    assert found.weight_files == SHARDS
    assert len(found.left_out) == 3


@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_variant_alone_is_the_model(tmp_path: Path, num_shards: int) -> None:
    write_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    write_shards(tmp_path, "model.fp16", num_shards)
    found = recognise(tmp_path)
    assert len(found.weight_files) == num_shards
    assert found.warnings == ()


def test_an_index_may_name_files_of_any_name(tmp_path: Path) -> None:
    write_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    write_index(tmp_path, write_shards(tmp_path, "pytorch_model", 2))
    assert recognise(tmp_path).weight_files == (
        "pytorch_model-00001-of-00002.safetensors",
        "pytorch_model-00002-of-00002.safetensors",
    )


def test_parts_that_no_index_names_are_told(tmp_path: Path) -> None:
    write_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    names = list(llama_shapes())
    for part, some in (("a", names[:9]), ("b", names[9:])):
        tensors = {name: llama_shapes()[name] for name in some}
        write_safetensors(tmp_path / f"model-{part}.safetensors", tensors)
    found = recognise(tmp_path)
    assert found.weight_files == ("model-a.safetensors", "model-b.safetensors")
    warned(found, "no index", "model-a.safetensors, model-b.safetensors")


def test_mistrals_own_format_alone(tmp_path: Path) -> None:
    write_llama(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "consolidated.safetensors")
    refused(tmp_path, "Mistral's own format", "model*.safetensors and config.json")


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "config.json"])
def test_an_index_that_names_what_are_no_weights(tmp_path: Path, file: str) -> None:
    write_llama(tmp_path)
    write_index(tmp_path, {**dict.fromkeys(llama_shapes(), "model.safetensors"), "x": file})
    refused(tmp_path, f"{file} is missing")


def test_a_long_numbering_ends(tmp_path: Path) -> None:
    write_llama(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-999999999.safetensors")
    refused(tmp_path, "is missing")
    json.dumps(recognise(write_llama(tmp_path / "other")).warnings)
