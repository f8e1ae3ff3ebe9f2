"""Stored of a folder is what its checkpoint consists of, and both load as the same model."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlops import engine
from mlops.checkpoints import recognise
from mlops.cli import main
from mlops.client.weights import checkpoint_files, files_digest
from mlops.engine.owner import run_in_owner
from mlops.registry import ModelStore, references, resolve, verify
from mlops.serving.bentoml.packager import package_model
from mlops.serving.http.kept_adapters import KeptAdapters
from tiny_models import write_language_model, write_lora_adapter, write_peft_adapter
from torch_process import PYTHON


def copy_to(*names: str) -> Callable[[Path, Path], None]:
    """Another model's weights under these names: whoever reads them computes something else."""

    def write(folder: Path, other: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((other / "model.safetensors").read_bytes())

    return write


def text(*names: str) -> Callable[[Path, Path], None]:
    def write(folder: Path, other: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}" if name.endswith("json") else f"# {name}")

    return write


def pickled(*names: str) -> Callable[[Path, Path], None]:
    def write(folder: Path, other: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(pickle.dumps(name))

    return write


def links(folder: Path, other: Path) -> None:
    (folder / "data").symlink_to("/")
    (folder / "checkpoint-last").symlink_to("checkpoint-50")


EXTRAS = {
    "checkpoint": lambda folder, other: (
        copy_to("checkpoint-50/model.safetensors")(folder, other),
        text("checkpoint-50/config.json", "checkpoint-50/tokenizer.json")(folder, other),
        pickled("checkpoint-50/optimizer.pt")(folder, other),
    ),
    "states": pickled("optimizer.pt", "rng_state.pth", "training_args.bin", "scheduler.pt"),
    "reports": text("trainer_state.json", "all_results.json", "train.log", "data.jsonl"),
    "runs": text("runs/Nov28/events.out.tfevents.1", "wandb/run-1/files/config.yaml"),
    "code": text("zero_to_fp32.py", "modeling_llama.py", "src/train.py"),
    "deepspeed": pickled("global_step500/mp_rank_00_model_states.pt"),
    "meta": pickled("original/consolidated.00.pth"),
    "onnx": text("onnx/model.onnx", "model.gguf"),
    "pickled weights": pickled("pytorch_model.bin", "pytorch_model-00001-of-00001.bin"),
    "old": copy_to("model_old.safetensors"),
    "fp16": copy_to("model-fp16.safetensors", "model.fp16.safetensors"),
    "mistral": copy_to("consolidated.safetensors"),
    "other shards": copy_to("pytorch_model-00001-of-00001.safetensors"),
    "links": links,
}


def write_base(folder: Path, kind: str) -> Path:
    """A model with all that goes with one."""
    write_language_model(
        folder,
        shards=1 if kind == "one file" else 3,
        quantize_bits=4 if kind == "quantized shards" else None,
    )
    nothing = Path()
    text(
        "README.md", "LICENSE", "generation_config.json", "special_tokens_map.json", "merges.txt",
        "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "1_Pooling/config.json",
    )(folder, nothing)  # fmt: skip
    (folder / "modules.json").write_text(
        json.dumps([{"type": "Transformer"}, {"type": "Pooling", "path": "1_Pooling"}])
    )
    return folder


def logits(folder: Path) -> np.ndarray[Any, Any]:
    loaded = engine.load_model(folder)

    def compute() -> np.ndarray[Any, Any]:
        import mlx.core as mx

        return np.array(loaded.model(mx.array([[72, 101, 108, 108, 111]])).astype(mx.float32))

    return run_in_owner(compute)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("other"), seed=9)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(["one file", "shards", "quantized shards"]),
    extras=st.sets(st.sampled_from(sorted(EXTRAS)), min_size=1),
)
def test_a_model_is_the_same_with_and_without_what_lies_beside_it(
    kind: str,
    extras: set[str],
    bentoml_home: Path,
    tmp_path_factory: pytest.TempPathFactory,
    other: Path,
) -> None:
    folder = write_base(tmp_path_factory.mktemp("model"), kind)
    own = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    clean = package_model(folder, "demo", build_bento=False)
    expected = logits(folder)
    assert clean["left_out"] == []
    assert not left_out_warnings(clean)
    for name in sorted(extras):
        EXTRAS[name](folder, other)

    result = package_model(folder, "demo", build_bento=False)

    entry = ModelStore().get(result["model_tag"])
    assert {file.path for file in entry.manifest.files} == own == set(recognise(folder).files)
    assert result["model_digest"] == clean["model_digest"]
    assert (result["num_files"], result["size_bytes"]) == (len(own), clean["size_bytes"])
    assert references.content_digest(resolve(folder)) == result["model_digest"]
    assert files_digest(checkpoint_files(folder)) == entry.manifest.files_digest
    named = " ".join(result["left_out"])
    beside = {path.name for path in folder.iterdir()} - {name.split("/")[0] for name in own}
    assert all(name in named for name in beside)
    assert bool(left_out_warnings(result)) == any(name.endswith(".safetensors") for name in beside)
    assert np.array_equal(logits(folder), expected)
    assert np.array_equal(logits(entry.path), expected)


def left_out_warnings(result: dict[str, Any]) -> list[str]:
    return [warning for warning in result["warnings"] if "left out" in warning]


@pytest.mark.parametrize("stray", ["model_old.safetensors", "model.fp16.safetensors"])
def test_a_stray_set_changes_no_answer_and_is_logged_once(
    tmp_path: Path, other: Path, stray: str, caplog: pytest.LogCaptureFixture
) -> None:
    """mlx-lm alone would merge it: another model's weights under the same names."""
    write_language_model(tmp_path, shards=2)
    expected = logits(tmp_path)
    copy_to(stray)(tmp_path, other)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(logits(tmp_path), expected)
    assert caplog.text.count(f"{stray} left out") == 1


def test_weights_of_any_name_that_the_index_gives(tmp_path: Path) -> None:
    write_language_model(tmp_path, shards=2)
    expected = logits(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = index.read_text()
    for number in (1, 2):
        old = f"model-0000{number}-of-00002.safetensors"
        (tmp_path / old).rename(tmp_path / f"part{number}.safetensors")
        content = content.replace(old, f"part{number}.safetensors")
    index.write_text(content)
    assert np.array_equal(logits(tmp_path), expected)


@pytest.mark.parametrize("write", [write_lora_adapter, write_peft_adapter])
def test_an_adapter_and_its_base_are_stored_by_the_same_set(
    write: Callable[..., Path], bentoml_home: Path, tmp_path: Path, other: Path
) -> None:
    base = write_language_model(tmp_path / "base")
    adapter = write(tmp_path / "adapter", base)
    clean = package_model(adapter, "tone", build_bento=False)
    kept = KeptAdapters(tmp_path / "kept", None).adapter_at(adapter)
    for folder in (base, adapter):
        for name in ("checkpoint", "states", "code", "runs", "reports"):
            EXTRAS[name](folder, other)
    text("0000100_adapters.safetensors")(adapter, other)
    EXTRAS["old"](base, other)

    result = package_model(adapter, "tone", build_bento=False)

    assert result["model_digest"] == clean["model_digest"]
    assert result["base_model_tag"] == clean["base_model_tag"]
    assert {"checkpoint-50/ (4 files)", "base model: checkpoint-50/ (4 files)"} <= set(
        result["left_out"]
    )
    (warning,) = result["warnings"]
    assert warning.startswith("base model: model_old.safetensors left out")
    assert KeptAdapters(tmp_path / "kept", None).adapter_at(adapter) == kept
    assert resolve(result["model_tag"], base_model=base).base is not None
    assert package_model(base, "demo", adapters={"tone": adapter}, build_bento=False)["left_out"]


def test_patterns_ask_for_more(bentoml_home: Path, tmp_path: Path, other: Path) -> None:
    folder = write_language_model(tmp_path / "model")
    for name in ("checkpoint", "reports", "old"):
        EXTRAS[name](folder, other)
    result = package_model(
        folder, "demo", include_patterns=["checkpoint-50", "model_old.*"], build_bento=False
    )
    entry = ModelStore().get(result["model_tag"])
    stored = {file.path for file in entry.manifest.files}
    assert {"checkpoint-50/model.safetensors", "model_old.safetensors", "config.json"} <= stored
    assert "trainer_state.json" in result["left_out"]
    assert "checkpoint-50/ (1 file)" in result["left_out"]  # its pickle
    verify(resolve(result["model_tag"]))
    assert np.array_equal(logits(entry.path), logits(folder))


def test_the_command_says_what_it_leaves_out(
    bentoml_home: Path,
    tmp_path: Path,
    other: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = write_language_model(tmp_path / "model")
    for name in ("checkpoint", "old"):
        EXTRAS[name](folder, other)

    def run(*options: str) -> str:
        command = ["mlops", "package", str(folder), "--no-bento", *options]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr().out

    lines = run().splitlines()
    assert (
        "left out checkpoint-50/ (4 files), model_old.safetensors; --include asks for more" in lines
    )
    assert any(line.startswith("warning  model_old.safetensors left out: ") for line in lines)
    told = json.loads(run("--json"))
    assert told["left_out"] == ["checkpoint-50/ (4 files)", "model_old.safetensors"]
    assert len(told["warnings"]) == 1


@pytest.mark.skipif(
    not PYTHON.exists(), reason="torch and PEFT are not in .tools/reference: make reference"
)
def test_folders_that_transformers_trainer_wrote(bentoml_home: Path, tmp_path: Path) -> None:
    base = write_language_model(tmp_path / "base", metadata_format="pt")
    full, adapter = tmp_path / "full", tmp_path / "adapter"
    script = Path(__file__).with_name("trainer_reference.py")
    subprocess.run(
        [PYTHON, script, base, full, adapter],
        check=True,
        capture_output=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    for folder, weights in ((full, "model"), (adapter, "adapter_model")):
        result = package_model(folder, "trained", base_model=None, build_bento=False)
        stored = {file.path for file in ModelStore().get(result["model_tag"]).manifest.files}
        assert {f"{weights}.safetensors", "tokenizer.json", "tokenizer_config.json"} <= stored
        assert not any("checkpoint" in name or name == "trainer_state.json" for name in stored)
        left = " ".join(result["left_out"])
        assert all(name in left for name in ("checkpoint-1/", "checkpoint-2/", "training_args.bin"))
        assert result["warnings"] == []
