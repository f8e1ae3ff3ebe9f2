"""What loading would refuse is refused when packaging, with the same sentence; nothing is read."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import quantized_models as packing
import tiny_models
from mlops import engine
from mlops.checkpoints import recognise
from mlops.engine.owner import run_in_owner
from mlops.engine.servable import check_loads
from mlops.errors import PackagingError, ServiceError

ARCHITECTURES = ["llama", "qwen3_moe", "gemma3_text", "mamba2", "qwen3_next", "gpt2", "phi3"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each architecture; tests change copies."""
    root = tmp_path_factory.mktemp("models")
    return {
        name: tiny_models.write_language_model(root / name, architecture=name)
        for name in ARCHITECTURES
    }


@pytest.fixture
def phi3(models: dict[str, Path], tmp_path: Path) -> Path:
    """An architecture whose tensors `consistency` does not know by name."""
    return Path(shutil.copytree(models["phi3"], tmp_path / "model"))


def read_tensors(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def write_tensors(folder: Path, tensors: dict[str, Any]) -> None:
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    packing.write_tensors(folder / "model.safetensors", tensors)


def write_config(folder: Path, **changes: Any) -> None:
    """`...` takes a setting away."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder: Path) -> str:
    """What packaging says; loading says the same."""
    try:
        found = recognise(folder)
    except PackagingError as exc:
        return exc.message
    with pytest.raises(PackagingError) as packaging:
        check_loads(found)
    with pytest.raises(ServiceError) as loading:
        engine.load_model(found)
    if "cannot compute with the settings" not in packaging.value.message:
        assert packaging.value.message == loading.value.message
    assert "\n" not in packaging.value.message
    return packaging.value.message


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_whole_is_left_alone(models: dict[str, Path], architecture: str) -> None:
    assert check_loads(recognise(models[architecture])) == []


NORM = "model.layers.1.input_layernorm.weight"


def test_tensors_that_are_missing_or_unexpected(phi3: Path) -> None:
    tensors = read_tensors(phi3)
    tensors["model.layers.1.extra.weight"] = tensors.pop(NORM)
    write_tensors(phi3, tensors)
    assert (
        f"are not those of mlx-lm's phi3: {NORM} missing; "
        "no place for model.layers.1.extra.weight; copy or download"
    ) in refused(phi3)


def test_a_shape_against_a_shape(phi3: Path) -> None:
    write_config(phi3, intermediate_size=96)
    message = refused(phi3)
    assert "model.layers.0.mlp.gate_up_proj.weight" in message
    assert "is 128x32, but by config.json 192x32" in message


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32])
def test_whole_numbers_in_place_of_weights(phi3: Path, dtype: Any) -> None:
    """mlx-lm would multiply by them: the names and shapes are right."""
    tensors = read_tensors(phi3)
    tensors[NORM] = tensors[NORM].astype(dtype)
    write_tensors(phi3, tensors)
    assert f"{NORM} in {phi3} is stored as {np.dtype(dtype).name}" in refused(phi3)


def test_a_missing_expert(models: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models["qwen3_moe"], tmp_path / "model"))
    tensors = read_tensors(folder)
    for name in [name for name in tensors if ".switch_mlp." in name]:
        for number, array in enumerate(tensors.pop(name)):
            expert = name.replace("switch_mlp", f"experts.{number}")
            if expert != "model.layers.0.mlp.experts.2.up_proj.weight":
                tensors[expert] = array
    write_tensors(folder, tensors)
    message = refused(folder)
    assert "the tensor model.layers.0.mlp.experts.2.up_proj.weight is missing" in message


def test_a_setting_that_mlx_lm_needs(models: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models["qwen3_moe"], tmp_path / "model"))
    write_config(folder, num_experts=..., norm_topk_prob=...)
    # What transformers takes then is 128.
    assert "mlp.gate.weight" in refused(folder)
    assert "is 4x32, but by config.json 128x32" in refused(folder)
    shutil.copytree(models["mamba2"], folder, dirs_exist_ok=True)
    write_config(folder, expand=None, intermediate_size=...)
    assert "does not set intermediate_size, which mlx-lm needs for mamba2" in refused(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x' in config.json, not a number"),
        ({"head_dim": 0, "rope_theta": [1]}, "rope_theta in config.json is '[1]', not"),
    ],
)
def test_values_that_are_refused_before(phi3: Path, changes: dict[str, Any], named: str) -> None:
    write_config(phi3, **changes)
    with pytest.raises(PackagingError) as error:
        recognise(phi3)
    assert named in error.value.message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": 3}, "architectures '3'"),
        ({"text_config": 3}, "text_config '3'"),
    ],
)
def test_settings_of_another_kind(phi3: Path, changes: dict[str, Any], named: str) -> None:
    write_config(phi3, **changes)
    assert named in refused(phi3)


@pytest.mark.parametrize("num_groups", [0, 40, 1000])
@pytest.mark.parametrize("is_awq", [False, True])
def test_groups_that_mlx_would_divide_by_zero_for(
    phi3: Path, num_groups: int, is_awq: bool
) -> None:
    """That ends the process, not the call."""
    tensors = read_tensors(phi3)
    name = "model.layers.0.self_attn.o_proj"
    rows, columns = tensors.pop(f"{name}.weight").shape
    if is_awq:
        tensors[f"{name}.qweight"] = np.zeros((columns, rows // 8), np.int32)
        tensors[f"{name}.scales"] = np.zeros((num_groups, rows), np.float16)
        write_config(phi3, quantization_config={"quant_method": "awq", "bits": 4})
    else:
        tensors[f"{name}.weight"] = np.zeros((rows, columns // 8), np.uint32)
        tensors[f"{name}.scales"] = np.zeros((rows, num_groups), np.float32)
        tensors[f"{name}.biases"] = np.zeros((rows, num_groups), np.float32)
        write_config(phi3, quantization={"bits": 4, "group_size": 32})
    write_tensors(phi3, tensors)
    with pytest.raises(PackagingError, match=r"groups of \d+, which MLX does not have"):
        check_loads(recognise(phi3))


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"type": "X"}}', "\u0000"])
def test_a_tokenizer_that_cannot_be_read(phi3: Path, content: str) -> None:
    (phi3 / "tokenizer.json").write_text(content)
    with pytest.raises(PackagingError, match=r"the tokenizer of .* cannot be loaded") as caught:
        check_loads(recognise(phi3))
    assert "\n" not in caught.value.message


def test_a_tokenizer_of_a_larger_model(tmp_path: Path) -> None:
    folder = tiny_models.write_language_model(tmp_path, vocab=200)
    with pytest.raises(PackagingError, match="its embedding has 200 rows") as caught:
        check_loads(recognise(folder))
    assert "use the tokenizer that was saved with the weights" in caught.value.message


def test_tokens_that_were_added_to_the_tokenizer_alone(tmp_path: Path) -> None:
    folder = tiny_models.write_language_model(tmp_path, vocab=258)
    of_end, added = check_loads(recognise(folder))
    assert "the end tokens 258 are none of the model's 258 tokens" in of_end
    assert f"added to the tokenizer of {folder} and not to the model (<|end|>)" in added


OWN_TOKENIZER = {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "tokenizer_class": "X"}


def test_a_tokenizer_with_code_of_its_own_is_read_without(phi3: Path) -> None:
    path = phi3 / "tokenizer_config.json"
    expected = engine.load_model(phi3).tokenizer.encode("né 1")
    path.write_text(json.dumps(json.loads(path.read_text()) | OWN_TOKENIZER))
    found = recognise(phi3)
    assert "tokenizer_config.json names Python code" in found.warnings[0]
    assert engine.load_model(found).tokenizer.encode("né 1") == expected


def test_a_tokenizer_that_needs_code_of_its_own_is_refused(tmp_path: Path) -> None:
    folder = tiny_models.write_language_model(tmp_path)
    (folder / "tokenizer.json").rename(folder / "x.tiktoken")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | OWN_TOKENIZER))
    with pytest.raises(PackagingError, match="needs Python code of the checkpoint's own"):
        check_loads(recognise(folder))


def test_no_weight_is_read(tmp_path: Path) -> None:
    width = 2**20
    tiny_models.write_hollow_llama(tmp_path, head_dim=2)
    folder = tmp_path.with_name("adapter")
    folder.mkdir()
    module = "model.layers.0.self_attn.q_proj"
    tiny_models.write_safetensors(
        folder / "adapters.safetensors",
        {f"{module}.lora_a": (width, 2), f"{module}.lora_b": (2, 4)},
    )
    (folder / "adapter_config.json").write_text('{"lora_parameters": {"scale": 1.0}}')
    assert check_loads(recognise(tmp_path), recognise(folder)) == []


def test_an_adapter_that_the_models_code_has_no_place_for(tmp_path: Path) -> None:
    """Its shapes fit. mlx-lm's seed_oss reads the weight of its tied output layer itself."""
    folder = tiny_models.write_language_model(
        tmp_path / "base", architecture="seed_oss", tie_word_embeddings=True
    )
    write_config(folder, attention_bias=False)  # transformers' default is another
    base = recognise(folder)
    adapter = tiny_models.write_lora_adapter(tmp_path / "a", base.path, keys=["model.embed_tokens"])
    with pytest.raises(PackagingError, match="reads its weight past the adapter"):
        check_loads(base, recognise(adapter))
    fitting = tiny_models.write_lora_adapter(tmp_path / "b", base.path, keys=["mlp.up_proj"])
    check_loads(base, recognise(fitting))


def test_weights_that_are_computed_with_by_metal_alone(phi3: Path) -> None:
    """Packaged all the same: the machine that packages need not be the one that serves."""
    import mlx.core as mx

    tensors = read_tensors(phi3)
    for name, tensor in list(tensors.items()):
        if tensor.ndim == 2 and "embed_tokens" not in name:
            tensors[name] = np.zeros((-(-tensor.shape[0] // 4), tensor.shape[1]), np.uint8)
            tensors[f"{name}_scale"] = np.ones(1, np.float32)
    write_tensors(phi3, tensors)
    write_config(phi3, quantization_config={"quant_method": "bitnet"})
    warnings = check_loads(recognise(phi3))
    if mx.metal.is_available():
        assert warnings == []
    else:
        assert "on Apple's GPU alone" in warnings[0]


def test_where_mlx_cannot_be_imported_it_says_what_was_not_checked(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlops.engine.mlx_lm", None)
    (warning,) = check_loads(recognise(models["llama"]))
    assert "MLX cannot be imported here" in warning
    assert "neither names and shapes of its tensors, nor its tokenizer" in warning


values = st.sampled_from(
    [..., None, 0, -1, 1, 3, 2**31, 10**9, 10**12, 10**400, 1.5, float("inf"), float("nan")]
) | st.sampled_from([True, "x", "", "f" * 5000, [], ["x"], [10**9] * 3, [0] * 5000, {}, {"x": 1}])
further = st.sampled_from([
    "text_config", "rope_scaling", "rope_parameters", "quantization", "quantization_config",
    "layer_types", "num_experts", "n_routed_experts", "n_layers", "sliding_window",
    "architectures", "quantize_activations", "layers_block_type", "sliding_window_pattern",
])  # fmt: skip


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), architecture=st.sampled_from(ARCHITECTURES))
def test_any_config_is_refused_or_fine(
    models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    architecture: str,
) -> None:
    """In bounded time and memory, with no other error."""
    original = models[architecture]
    config = json.loads((original / "config.json").read_text())
    keys = st.sampled_from(sorted(config)) | further
    changes = data.draw(st.dictionaries(keys, values, min_size=1, max_size=2))
    folder = tmp_path_factory.mktemp("any")
    for path in original.iterdir():
        if path.name != "config.json":
            shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps(config))
    write_config(folder, **changes)
    with suppress(PackagingError):
        check_loads(recognise(folder))


def test_a_model_without_a_tokenizer_can_be_stored_and_says_that_it_is_not_served(
    phi3: Path,
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (phi3 / name).unlink()
    (warning,) = check_loads(recognise(phi3))
    assert "has no tokenizer, so it cannot be served" in warning


def test_what_transformers_refuses_in_config_json_is_not_blamed_on_the_tokenizer(
    phi3: Path,
) -> None:
    write_config(phi3, eos_token_id="</s>")
    with pytest.raises(PackagingError, match=r"config.json beside it .*'eos_token_id'"):
        check_loads(recognise(phi3))


def write_tied(folder: Path, architecture: str = "llama", *, factor: float) -> Path:
    """Tied by its config.json, with an output layer in the file: the embedding times a factor."""
    tiny_models.write_language_model(folder, architecture=architecture, tie_word_embeddings=True)
    tensors = read_tensors(folder)
    tensors["lm_head.weight"] = factor * tensors["model.embed_tokens.weight"]
    write_tensors(folder, tensors)
    return folder


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3"])
def test_a_copy_of_the_embedding_is_no_output_layer(tmp_path: Path, architecture: str) -> None:
    found = recognise(write_tied(tmp_path / "model", architecture, factor=1.0))
    assert found.warnings == ()
    assert check_loads(found) == []


def test_wavelengths_that_were_saved_are_no_weights(tmp_path: Path) -> None:
    folder = tiny_models.write_language_model(tmp_path, architecture="qwen3_moe")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    write_tensors(folder, read_tensors(folder) | {name: np.ones(8, np.float32)})
    assert check_loads(recognise(folder)) == []


def test_an_output_layer_of_its_own_is_computed_with(tmp_path: Path) -> None:
    """As transformers 5 does, whatever tie_word_embeddings says."""
    tied, own = (write_tied(tmp_path / str(factor), factor=factor) for factor in (1.0, 2.0))
    assert "lm_head.weight has other values" in recognise(own).warnings[0]
    rows = [run_in_owner(logits, engine.load_model(folder).model) for folder in (tied, own)]
    np.testing.assert_allclose(rows[1], 2 * rows[0], rtol=1e-4, atol=1e-5)


def logits(model: Any) -> Any:
    import mlx.core as mx

    return np.array(model(mx.array([[1, 2, 3]])))
