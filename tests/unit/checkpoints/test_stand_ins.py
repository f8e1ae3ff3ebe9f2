"""Git LFS pointers, web pages, errors and halves of downloads, each told by the file's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlops.checkpoints import recognise
from mlops.checkpoints.stand_ins import LEFTOVERS
from mlops.errors import PackagingError
from plain_llama import write_llama, write_plain_adapter

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>404</title></head></html>"
ERRORS = [
    b'{"error": "Repository not found"}',
    b'{"statusCode": 404, "message": "no such file", "error": "Not Found"}',
    b'{"detail": "Not authenticated"}',
    b"Access to model org/name is restricted. You must be authenticated to access it.",
    b"Entry not found",
]
OF_A_MODEL = [
    "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "model.safetensors.index.json", "tokenizer.model", "vocab.json", "merges.txt",
    "chat_template.jinja", "additional_chat_templates/tool.jinja", "special_tokens_map.json",
    "README.md", "hf_quant_config.json",
]  # fmt: skip
OF_AN_ADAPTER = ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]


def refused(folder: Path, *parts: str) -> PackagingError:
    with pytest.raises(PackagingError) as caught:
        recognise(folder)
    for part in parts:
        assert part in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value


@pytest.fixture(params=["model", "adapter"])
def named(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[str]]:
    """A folder, and names of files that its checkpoint has or may have."""
    if request.param == "model":
        return write_llama(tmp_path, num_shards=2, with_index=True), OF_A_MODEL
    return write_plain_adapter(tmp_path), OF_AN_ADAPTER


def replaced(folder: Path, name: str, content: bytes) -> bytes | None:
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    before = file.read_bytes() if file.exists() else None
    file.write_bytes(content)
    return before


def put_back(folder: Path, name: str, before: bytes | None) -> None:
    if before is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(before)


def test_any_file_may_be_a_pointer(named: tuple[Path, list[str]]) -> None:
    folder, names = named
    for name in names:
        before = replaced(folder, name, POINTER)
        error = refused(folder, f"{name} in {folder} is a Git LFS pointer", "git lfs pull")
        assert error.details["file"] == name
        put_back(folder, name, before)
    assert recognise(folder).warnings == ()


def test_a_pointer_that_is_left_out_does_no_harm(tmp_path: Path) -> None:
    write_llama(tmp_path)
    for name in ("model_old.safetensors", "checkpoint-5/config.json", "onnx/model.onnx"):
        replaced(tmp_path, name, POINTER)
    assert recognise(tmp_path).weight_files == ("model.safetensors",)


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2", "model.mlmodel", "model.mlxfn"])
def test_models_of_other_libraries(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(POINTER)
    for path in (tmp_path, tmp_path / name):
        refused(path, f"{name} in", "Git LFS pointer")
    (tmp_path / name).write_bytes(PAGE)
    refused(tmp_path, f"{name} in", "a web page", "download it again")


def test_any_file_may_be_a_web_page_or_empty(named: tuple[Path, list[str]]) -> None:
    folder, names = named
    for name in names:
        if name.endswith((".json", ".safetensors", ".model")):
            for content, reason in ((PAGE, "holds a web page"), (b"", "is empty")):
                before = replaced(folder, name, content)
                refused(folder, f"{name} in {folder} {reason}", "download it again")
                put_back(folder, name, before)


@pytest.mark.parametrize("content", ERRORS)
def test_any_file_may_be_an_error_message(named: tuple[Path, list[str]], content: bytes) -> None:
    folder, names = named
    for name in names:
        if name.endswith((".json", ".safetensors")):
            before = replaced(folder, name, content)
            refused(folder, f"{name} in {folder} holds", "as a server gives it", "download it")
            put_back(folder, name, before)


def test_a_template_may_begin_as_a_page_does(tmp_path: Path) -> None:
    write_llama(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("<html>{{ messages }}</html>")
    (tmp_path / "README.md").write_text("")
    assert {"chat_template.jinja", "README.md"} <= set(recognise(tmp_path).files)


@pytest.mark.parametrize("suffix", LEFTOVERS)
def test_an_unfinished_download(named: tuple[Path, list[str]], suffix: str) -> None:
    """aria2 gives the file its whole size at once, so the header alone looks whole."""
    folder, names = named
    for name in names:
        if (folder / name).exists():
            leftover = folder / f"{name}{suffix}"
            leftover.write_bytes(b"control")
            error = refused(folder, f"the download of {name}", leftover.name, "not finished")
            assert error.details["file"] == name
            leftover.unlink()


def test_a_tokenizer_that_is_still_on_its_way(tmp_path: Path) -> None:
    write_llama(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.json.incomplete")
    refused(tmp_path, "the download of tokenizer.json", "not finished")


def test_weights_that_are_still_on_their_way(tmp_path: Path) -> None:
    write_llama(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.safetensors.part")
    refused(tmp_path, "the download of model.safetensors", "not finished")


def test_what_is_left_of_something_else_is_left_out(tmp_path: Path) -> None:
    write_llama(tmp_path)
    (tmp_path / "model_old.gguf.part").write_bytes(b"x")
    assert recognise(tmp_path).left_out == ("model_old.gguf.part",)
