"""Which files a checkpoint consists of, beside all that trainers and downloads leave there."""

from __future__ import annotations

import json
import os
import pickle
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from mlops.checkpoints import CheckpointKind, recognise, stored_files
from mlops.checkpoints.file_set import MAX_NAMED, summary
from mlops.errors import PackagingError
from plain_llama import write_llama, write_plain_adapter

MODEL = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
STRAYS = [
    "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "scaler.pt", "training_args.bin",
    "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json", "latest",
    "zero_to_fp32.py", "modeling_llama.py", "train.log", "data.jsonl", "requirements.txt",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "tf_model.h5",
    "flax_model.msgpack", "params.json", "recipe.yaml", "license.py", "tokenizer.pkl",
    "model.safetensors.index.fp16.json", "0000100_adapters.safetensors", "mlops-manifest.json",
]  # fmt: skip
FOLDERS = [
    "checkpoint-50", "checkpoint-100", "checkpoint_epoch_2", "runs", "wandb", "global_step500",
    "original", "onnx", "logs", "merged", "src",
]  # fmt: skip


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(pickle.dumps(name))


@pytest.mark.parametrize("write", [write_llama, write_plain_adapter])
def test_what_a_trainer_leaves_is_left_out_and_named(tmp_path: Path, write) -> None:  # type: ignore[no-untyped-def]
    own = recognise(write(tmp_path)).files
    assert own == (MODEL if write is write_llama else ADAPTER)
    fill(tmp_path, *STRAYS, *(f"{folder}/{name}" for folder in FOLDERS for name in STRAYS))
    for folder in FOLDERS:
        write(tmp_path / folder)
    found = recognise(tmp_path)
    assert found.files == own
    in_each = len(STRAYS) + len(own)
    folders = [f"{folder}/ ({in_each} files)" for folder in FOLDERS]
    assert found.left_out == tuple(sorted([*STRAYS, *folders]))


@pytest.mark.parametrize("write", [write_llama, write_plain_adapter])
@pytest.mark.parametrize(
    "name",
    [
        "README.md", "LICENSE", "LICENSE.txt", "Notice.txt", "USE_POLICY.md", "Gemma_Licence.txt",
        "chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja",
        "tokenizer.model", "tokenizer.model.v3", "tokenizer_config.json", "qwen.tiktoken",
        "generation_config.json", "hf_quant_config.json", "tekken.json", "added_tokens.json",
        "config_sentence_transformers.json", "sentence_bert_config.json",
        "video_preprocessor_config.json", "configuration.json",
    ],
)  # fmt: skip
def test_what_goes_with_the_weights(tmp_path: Path, write, name: str) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    found = recognise(tmp_path)
    assert name in found.files
    assert found.left_out == ()


def names_in_transformers() -> set[str]:
    """The names of files that transformers' source says it reads a tokenizer or settings from."""
    spec = find_spec("transformers")
    assert spec is not None
    (root,) = spec.submodule_search_locations or ()
    names = set()
    for file in Path(root).rglob("*.py"):
        if "tokenization" in file.name or file.parent.name == "utils":
            text = file.read_text(encoding="utf-8")
            for block in re.findall(r"VOCAB_FILES_NAMES = \{(.*?)\}", text, re.DOTALL):
                names.update(re.findall(r': "([^"]+)"', block))
            names.update(re.findall(r'^[A-Z_]+_(?:NAME|FILE) = "([^"]+)"', text, re.MULTILINE))
    return {name for name in names if "." in name and "%" not in name}


def test_every_file_that_transformers_reads_a_tokenizer_from_is_kept(tmp_path: Path) -> None:
    write_llama(tmp_path)
    wanted = {
        name
        for name in names_in_transformers()
        if not name.endswith(
            (".bin", ".h5", ".msgpack", ".py", ".safetensors", ".index.json", "adapter_config.json")
        )
    }
    assert {"vocab.json", "spiece.model", "added_tokens.json", "chat_template.jinja"} <= wanted
    assert len(wanted) > 25
    for name in wanted - set(MODEL):
        (tmp_path / name).write_text("{}")
    assert wanted - set(recognise(tmp_path).files) == set()


def test_steps_of_an_embedding_model(tmp_path: Path) -> None:
    write_llama(tmp_path)
    steps = [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "pool"}, [], {}]
    (tmp_path / "modules.json").write_text(json.dumps([*steps, {"path": ["x"]}]))
    fill(tmp_path, "pool/config.json", "pool/notes.txt", "1_Pooling/config.json")
    (tmp_path / "pool/config.json").write_text("{}")
    found = recognise(tmp_path)
    assert found.files == tuple(sorted({*MODEL, "modules.json", "pool/config.json"}))
    assert found.left_out == ("1_Pooling/ (1 file)", "pool/ (1 file)")


def test_what_is_left_out_is_not_looked_at(tmp_path: Path) -> None:
    """Links to other disks and to earlier checkpoints, pipes, names and depths of any kind."""
    write_llama(tmp_path)
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-last").symlink_to("checkpoint-5")
    (tmp_path / "data").symlink_to("/")
    (tmp_path / "gone.json").symlink_to("/nowhere")
    (tmp_path / "runs" / "/".join(["d"] * 30)).mkdir(parents=True)
    os.mkfifo(tmp_path / "runs" / "pipe")
    (tmp_path / "a\nb").write_text("")
    found = recognise(tmp_path)
    assert found.files == MODEL
    assert found.left_out == (
        "a\\nb", "checkpoint-last", "data", "gone.json", "runs/ (2 files)",
    )  # fmt: skip


@pytest.mark.parametrize("name", [*MODEL, "README.md", "vocab.json"])
def test_a_file_of_the_set_may_not_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    write_llama(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("/etc/hostname")
    with pytest.raises(PackagingError, match=f"{name} is a link that leads out"):
        recognise(tmp_path)


def test_many_files_that_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_llama(tmp_path)
    fill(tmp_path, *(f"runs/{number}" for number in range(300)))
    monkeypatch.setattr("mlops.checkpoints.files.MAX_FILES", 50)
    assert recognise(tmp_path).left_out == ("runs/ (300 files)",)
    with pytest.raises(PackagingError, match="more than 50 files"):
        stored_files(recognise(tmp_path), include=["runs/*"])
    monkeypatch.setattr("mlops.checkpoints.files.MAX_NAMES", 200)
    with pytest.raises(PackagingError, match="more than 200 files"):
        recognise(tmp_path)


def test_a_summary_of_many_names_counts() -> None:
    lines = summary(f"{number:04}.log" for number in range(MAX_NAMED + 20))
    assert len(lines) == MAX_NAMED + 1
    assert lines[-1] == "and 20 more"


def test_a_folder_of_checkpoints_names_the_latest(tmp_path: Path) -> None:
    for step in (50, 100, 9):
        write_llama(tmp_path / f"checkpoint-{step}")
    fill(tmp_path, "training_args.bin", "runs/events")
    with pytest.raises(PackagingError, match="checkpoint-100 is the latest: give that folder"):
        recognise(tmp_path)


@pytest.mark.parametrize("name", ["model.onnx", "model.mlxfn"])
def test_a_model_of_another_library_keeps_what_it_may_read(tmp_path: Path, name: str) -> None:
    contents = {"model.onnx": b"\x08\x09\x3a\x03abc", "model.mlxfn": b"\6" + bytes(7) + b"0.32.4"}
    (tmp_path / name).write_bytes(contents[name])
    fill(tmp_path, "checkpoint-5/x", "runs/1", "optimizer.pt", "export.py", "trainer_state.json")
    for kept in ("labels.json", "model.onnx_data", "data/table.csv"):
        (tmp_path / kept).parent.mkdir(exist_ok=True)
        (tmp_path / kept).write_text("data")
    found = recognise(tmp_path)
    assert found.kind in (CheckpointKind.ONNX, CheckpointKind.MLX_FUNCTION)
    assert found.files == tuple(sorted({name, "labels.json", "model.onnx_data", "data/table.csv"}))
    assert found.left_out == (
        "checkpoint-5/ (1 file)", "export.py", "optimizer.pt", "runs/ (1 file)",
        "trainer_state.json",
    )  # fmt: skip


def stored(folder: Path, **patterns: list[str]) -> set[str]:
    return {file.relative_path for file in stored_files(recognise(folder), **patterns)}


def test_patterns(tmp_path: Path) -> None:
    write_llama(tmp_path)
    (tmp_path / "README.md").write_text("# A model")
    fill(tmp_path, "trainer_state.json", "checkpoint-5/config.json", "checkpoint-5/optimizer.pt")
    own = {*MODEL, "README.md"}
    assert stored(tmp_path) == own
    assert stored(tmp_path, include=["trainer_state.json"]) == own | {"trainer_state.json"}
    assert stored(tmp_path, include=["checkpoint-5/**"]) == own | {"checkpoint-5/config.json"}
    assert stored(tmp_path, include=["nothing"]) == own
    assert stored(tmp_path, exclude=["*.md"]) == set(MODEL)
    everything = own | {"trainer_state.json", "checkpoint-5/config.json"}
    assert stored(tmp_path, include=["*"]) == everything
    assert stored(tmp_path, include=["/*.json", "*.safetensors"]) == {*MODEL, "trainer_state.json"}
    assert stored(tmp_path, include=["*"], exclude=["checkpoint-5"]) == own | {"trainer_state.json"}


@pytest.mark.parametrize("name", ["optimizer.pt", "zero_to_fp32.py", "checkpoint-5/training.bin"])
def test_code_and_pickles_are_not_stored_whoever_asks(tmp_path: Path, name: str) -> None:
    write_llama(tmp_path)
    fill(tmp_path, name)
    with pytest.raises(PackagingError, match="code and pickles are never stored") as caught:
        stored(tmp_path, include=[name])
    assert caught.value.details["files"] == [name]
    assert stored(tmp_path, include=["*"]) == set(MODEL)


def test_what_vanishes_meanwhile(tmp_path: Path) -> None:
    found = recognise(write_llama(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(PackagingError, match=r"tokenizer\.json is gone"):
        stored_files(found)
