"""Every checkpoint that is refused, with one sentence that says why."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlops.checkpoints import CheckpointKind, recognise
from mlops.errors import PackagingError
from plain_llama import CONFIG, llama_shapes
from tiny_models import write_safetensors


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small llama, written without MLX."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", llama_shapes(), metadata={"format": "pt"})
    write_config(folder)
    return folder


def write_config(folder: Path, **changes: Any) -> None:
    config = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def refused(path: Path, *parts: str) -> PackagingError:
    with pytest.raises(PackagingError) as caught:
        recognise(path)
    error = caught.value
    for part in parts:
        assert part in error.message
    assert error.operation == "recognise"
    assert error.details["path"]
    assert "\n" not in error.message
    json.dumps(error.details)
    error.message.encode("utf-8")
    return error


def test_the_model_of_these_tests_is_recognised(model: Path) -> None:
    found = recognise(model)
    assert found.kind is CheckpointKind.LANGUAGE_MODEL
    assert (found.framework, found.architecture) == ("transformers", "llama")
    assert found.weight_files == ("model.safetensors",)
    assert found.num_parameters == sum(tensor.size for tensor in found.tensors.values())
    assert found.description == (
        "a llama language model, 1.4K parameters, 1 weight file, no tokenizer"
    )


def test_a_missing_path(tmp_path: Path) -> None:
    error = refused(tmp_path / "none", "does not exist", "give the folder")
    assert error.details["path"] == str(tmp_path / "none")


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "\udcff"])
def test_a_path_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    refused(tmp_path / name, "does not exist")


def test_a_file_instead_of_a_folder(model: Path) -> None:
    refused(model / "model.safetensors", "is a file: give the folder")


def test_an_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, "is empty: give the folder that holds the model")


def test_a_folder_without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    refused(model, "has no weights")


def test_weights_one_folder_below_are_pointed_at(model: Path) -> None:
    refused(model.parent, "has no weights", "there are some in model")


def test_weights_under_another_name(model: Path) -> None:
    (model / "model.safetensors").rename(model / "weights.safetensors")
    refused(model, "weights.safetensors", "rename the file")


def test_truncated_weights(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    error = refused(model, "model.safetensors is not a whole safetensors file")
    assert error.details["file"] == "model.safetensors"


def test_no_config(model: Path) -> None:
    (model / "config.json").unlink()
    refused(model, "has weights but no config.json")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "config.json is not valid JSON"),
        (b"\xff{}", "config.json is not valid JSON"),
        (b"[" * 100_000, "config.json is not valid JSON"),
        (b"[1]", "config.json is not a JSON object"),
        (b"{}", "does not say the architecture"),
        (b'{"model_type": 1}', "does not say the architecture"),
        (b'{"model_type": "../../evil"}', "does not say the architecture"),
        (b'{"model_type": "\\ud800\\n"}', "does not say the architecture"),
    ],
)
def test_a_config_that_is_none(model: Path, content: bytes, reason: str) -> None:
    (model / "config.json").write_bytes(content)
    refused(model, reason)


def test_a_config_over_the_limit_is_not_read(model: Path) -> None:
    with (model / "config.json").open("r+b") as file:
        file.truncate(65 * 2**20)
    refused(model, "over the limit")


@pytest.mark.parametrize("model_type", ["no_such_model", "base", "cache", "switch_layers"])
def test_an_unknown_architecture(model: Path, model_type: str) -> None:
    write_config(model, model_type=model_type)
    error = refused(model, f"architecture {model_type!r}", "unknown to the installed mlx-lm")
    assert error.details["architecture"] == model_type


def test_another_name_of_a_known_architecture(model: Path) -> None:
    write_config(model, model_type="mistral")
    assert recognise(model).architecture == "mistral"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hidden_size": 16}, "by hidden_size"),
        ({"vocab_size": 11}, "by vocab_size"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, but the weights have 2"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1, but the weights have 2"),
        ({"num_hidden_layers": 10**12}, "the weights have 2 layers"),
        ({"num_layers": 9, "num_hidden_layers": 10**12}, "the weights have 2 layers"),
        ({"num_hidden_layers": -1}, "not a positive number"),
        ({"num_hidden_layers": ...}, "num_hidden_layers is not set"),
        ({"hidden_size": "8"}, "not a positive number"),
        ({"vocab_size": []}, "not a positive number"),
        ({"intermediate_size": 17}, "by intermediate_size"),
        ({"num_attention_heads": 4, "head_dim": 4}, "by num_attention_heads"),
        ({"num_key_value_heads": 2}, "by num_key_value_heads"),
    ],
)
def test_a_config_that_does_not_match(model: Path, changes: dict[str, Any], problem: str) -> None:
    write_config(model, **changes)
    error = refused(model, "config.json does not match the weights", problem)
    assert problem in error.details["problem"]


@pytest.mark.parametrize(
    "changes",
    [
        {"text_config": {"model_type": ["llama"], "hidden_size": 8}},
        {"num_layers": [2]},
        {"architectures": [["x"], 1]},
        {"architectures": "LlamaForCausalLM"},
    ],
)
def test_odd_values_break_nothing(model: Path, changes: dict[str, Any]) -> None:
    write_config(model, **changes)
    assert recognise(model).architecture == "llama"


@pytest.mark.parametrize("missing", ["lm_head", "model.norm", "model.layers.1.self_attn.o_proj"])
def test_tensors_that_are_missing(model: Path, missing: str) -> None:
    shapes = llama_shapes()
    del shapes[f"{missing}.weight"]
    write_safetensors(model / "model.safetensors", shapes)
    refused(model, f"the weights of {missing} are missing")


def test_quantized_tensors_need_a_quantized_config(model: Path) -> None:
    shapes = llama_shapes()
    shapes["lm_head.weight"] = (10, 1)
    shapes["lm_head.scales"] = (10, 1)
    write_safetensors(model / "model.safetensors", shapes, dtype="U32")
    refused(model, "lm_head is quantized, but quantization is not set")


def shard(model: Path) -> None:
    """Split the model in two, with an index."""
    (model / "model.safetensors").unlink()
    shapes = llama_shapes()
    middle = len(shapes) // 2
    weight_map = {}
    for number, part in enumerate((list(shapes)[:middle], list(shapes)[middle:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        write_safetensors(model / file, {name: shapes[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    write_index(model, weight_map)


def write_index(model: Path, weight_map: Any) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards(model: Path) -> None:
    shard(model)
    assert len(recognise(model).weight_files) == 2


@pytest.mark.parametrize("with_index", [True, False])
def test_a_missing_shard(model: Path, with_index: bool) -> None:
    shard(model)
    (model / "model-00002-of-00002.safetensors").unlink()
    if not with_index:
        (model / "model.safetensors.index.json").unlink()
    error = refused(model, "weight file model-00002-of-00002.safetensors is missing")
    assert error.details["file"] == "model-00002-of-00002.safetensors"


def test_a_shard_outside_the_folder(model: Path) -> None:
    write_index(model, {"lm_head.weight": "../../etc/passwd"})
    refused(model, "weight file ../../etc/passwd is missing")


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}])
def test_an_index_that_is_none(model: Path, weight_map: Any) -> None:
    write_index(model, weight_map)
    refused(model, "has no weight_map")


def test_a_tensor_that_is_only_in_the_index(model: Path) -> None:
    write_index(model, dict.fromkeys([*llama_shapes(), "extra.weight"], "model.safetensors"))
    error = refused(model, "not in their files: extra.weight")
    assert error.details["tensors"] == ["extra.weight"]


def test_a_tensor_in_two_files(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-main.safetensors")
    write_safetensors(model / "model-extra.safetensors", {"lm_head.weight": (10, 8)})
    refused(model, "the tensor lm_head.weight is in", "remove the file")


class Evil:
    """Unpickling this ends the test run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (66,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "w.pt", "w.pth", "w.pkl", "w.ckpt"])
def test_pickled_weights(model: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Evil()))
    error = refused(model, f"weights in {name} are a pickle", "convert them to safetensors")
    assert error.details["file"] == name
    refused(model / name, f"weights in {name} are a pickle")


def test_a_pickled_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    refused(tmp_path, "weights in adapter_model.bin are a pickle")


def test_pickles_of_the_trainer_beside_safetensors_are_passed_over(model: Path) -> None:
    (model / "training_args.bin").write_bytes(pickle.dumps(Evil()))
    assert recognise(model).weight_files == ("model.safetensors",)


@pytest.mark.parametrize("name", ["modeling_evil.py", "sub/helper.py", "kernel.so", "license.py"])
def test_code_that_nothing_asks_for_is_left_out(model: Path, name: str) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("raise SystemExit(66)")
    found = recognise(model)
    assert name not in found.files
    assert found.left_out == (name if "/" not in name else "sub/ (1 file)",)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_config_that_asks_for_own_code(model: Path, file: str) -> None:
    write_key(model / file, model_file="evil.py")
    error = refused(model, "asks for the model's own Python code", "never run")
    assert (error.details["file"], error.details["key"]) == (file, "model_file")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_its_own_is_passed_over_where_mlx_lm_has_the_architecture(
    model: Path, file: str
) -> None:
    write_key(model / file, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (warning,) = recognise(model).warnings
    assert warning.startswith(f"{file} names Python code of the checkpoint's own (auto_map)")
    assert "never run" in warning


def test_code_of_its_own_is_named_where_mlx_lm_lacks_the_architecture(model: Path) -> None:
    write_config(model, model_type="evil", auto_map={"AutoConfig": "configuration_evil.Evil"})
    refused(model, "the architecture 'evil'", "its own code, which auto_map names, would be needed")


def write_key(path: Path, **keys: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | keys))


def test_a_link_out_of_the_folder(model: Path) -> None:
    (model / "tokenizer.json").symlink_to("/etc/hostname")
    refused(model, "tokenizer.json is a link that leads out of the folder")


def test_a_model_and_an_adapter_in_one_folder(model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    refused(model, "holds both a model and an adapter")


def write_pt2(path: Path, *members: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for member in members:
            archive.writestr(member, "")


def write_mlpackage(path: Path) -> None:
    weights = path / "Data/com.apple.CoreML/weights/weight.bin"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"\x80\x02\x00\x00 weights")
    (path / "Data/com.apple.CoreML/model.mlmodel").write_bytes(MLMODEL)
    entries = {"id": {"path": "com.apple.CoreML/model.mlmodel"}}
    (path / "Manifest.json").write_text(json.dumps({"itemInfoEntries": entries}))


ONNX = b"\x08\x09" + b"\x3a\x03abc"  # ir_version 9, a graph of three bytes
MLMODEL = b"\x08\x05" + b"\x12\x01x"  # version 5, a description of one byte
MLXFN = (6).to_bytes(8, "little") + b"0.32.4" + bytes(16)

WRITERS: dict[str, Callable[[Path], Any]] = {
    "model.onnx": lambda path: path.write_bytes(ONNX),
    "model.mlmodel": lambda path: path.write_bytes(MLMODEL),
    "model.mlxfn": lambda path: path.write_bytes(MLXFN),
    "model.pt2": lambda path: write_pt2(path, "m/archive_format", "m/models/model.json"),
    "model.mlpackage": write_mlpackage,
}


@pytest.mark.parametrize(
    ("name", "kind", "framework"),
    [
        ("model.onnx", CheckpointKind.ONNX, "onnx"),
        ("model.mlmodel", CheckpointKind.COREML, "coreml"),
        ("model.mlxfn", CheckpointKind.MLX_FUNCTION, "mlx"),
        ("model.pt2", CheckpointKind.PYTORCH, "pytorch"),
        ("model.mlpackage", CheckpointKind.COREML, "coreml"),
    ],
)
def test_models_of_other_libraries(
    tmp_path: Path, name: str, kind: CheckpointKind, framework: str
) -> None:
    WRITERS[name](tmp_path / name)
    for path in (tmp_path / name, tmp_path):
        found = recognise(path)
        assert (found.kind, found.framework) == (kind, framework)
        assert found.format == name.partition(".")[2]
        assert found.weight_bytes > 0
        assert all(
            (tmp_path / file).exists() or (path / file).exists() for file in found.weight_files
        )


@pytest.mark.parametrize("name", ["model.onnx", "model.mlmodel", "model.mlxfn", "model.pt2"])
@pytest.mark.parametrize("content", [b"", b"\x00", b"hello", b"\xff" * 40, b"\x3a\xff\xff\x7f"])
def test_a_damaged_model_of_another_library(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, f"{name} is not", "export it again")


def test_a_truncated_onnx_model(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(ONNX[:-1])
    refused(tmp_path, "model.onnx is not an ONNX model, or it is cut off")


def test_an_archive_of_torch_save_under_another_name(tmp_path: Path) -> None:
    write_pt2(tmp_path / "model.pt2", "archive_format", "m/data.pkl")
    refused(tmp_path, "model.pt2 holds a pickle or Python code")


def test_a_core_ml_package_with_a_part_missing(tmp_path: Path) -> None:
    write_mlpackage(tmp_path / "model.mlpackage")
    (tmp_path / "model.mlpackage/Data/com.apple.CoreML/model.mlmodel").unlink()
    refused(tmp_path, "names 'com.apple.CoreML/model.mlmodel', which is missing")


def test_a_core_ml_package_without_a_manifest(tmp_path: Path) -> None:
    write_mlpackage(tmp_path / "model.mlpackage")
    (tmp_path / "model.mlpackage/Manifest.json").unlink()
    refused(tmp_path / "model.mlpackage", "has no Manifest.json")


def test_a_file_that_is_named_like_a_core_ml_package(tmp_path: Path) -> None:
    (tmp_path / "model.mlpackage").write_bytes(MLMODEL)
    refused(tmp_path / "model.mlpackage", "is a file")


def test_several_formats_in_one_folder(tmp_path: Path) -> None:
    for name in ("model.onnx", "model.mlxfn"):
        WRITERS[name](tmp_path / name)
    refused(tmp_path, "several formats (.mlxfn, .onnx)")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("_orig_mod.model.norm.weight", "named as torch.compile has them"),
        ("module.model.norm.weight", "named as DistributedDataParallel has them"),
        ("base_model.model.model.norm.weight", "named as PEFT has them"),
        ("score.weight", "gives scores, not text: it has score.weight"),
        ("v_head.summary.weight", "gives scores, not text"),
    ],
)
def test_what_is_no_language_model_or_has_one_inside(model: Path, name: str, reason: str) -> None:
    shapes = llama_shapes() | {name: (8,)}
    write_safetensors(model / "model.safetensors", shapes)
    refused(model, reason)


def test_weights_of_64_bits(model: Path) -> None:
    raw = (model / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    for entry in header.values():
        if "data_offsets" in entry:
            entry["dtype"] = "F64"
            entry["data_offsets"] = [2 * offset for offset in entry["data_offsets"]]
    text = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + 2 * raw[8 + size :]
    )
    refused(model, "stored as F64, which MLX does not read; save the model again")


def test_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "the weights in", "are GGUF (model.Q4_K_M.gguf)")


def test_names_of_settings_do_not_reach_the_terminal_as_they_are(model: Path) -> None:
    write_config(model, **{"gain\x1b[31m\n": 3})
    assert "gain\\x1b[31m\\n" in recognise(model).warnings[0]


@pytest.mark.parametrize("name", ["head_dim", "decoder_sparse_step", "rotary_dim"])
def test_numbers_that_are_no_floating_point_number(model: Path, name: str) -> None:
    write_config(model, model_type="qwen3_moe", **{name: 10**400})
    refused(model, f"{name} is 1000", "that nothing computes with")
