"""Models and adapters that mlx-lm itself wrote and loads are recognised, whole and alike."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlops.checkpoints import (
    CheckpointKind,
    adapter_delta_is_zero,
    check_adapter_fits,
    recognise,
)
from mlops.errors import PackagingError
from tiny_models import (
    vocabulary_size,
    write_hollow_llama,
    write_language_model,
    write_lora_adapter,
    write_peft_adapter,
)

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mixtral", "phi3", "gpt2"]


def num_parameters(folder: Path) -> int:
    """As mlx-lm counts them, which loads the weights."""
    from mlx_lm.utils import get_total_parameters, load_model

    return int(get_total_parameters(load_model(folder, lazy=True)[0]))


@pytest.mark.parametrize("quantize_bits", [None, 4])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_language_models(tmp_path: Path, architecture: str, quantize_bits: int | None) -> None:
    write_language_model(
        tmp_path, architecture=architecture, quantize_bits=quantize_bits, shards=2, dtype="bfloat16"
    )
    found = recognise(tmp_path)
    assert found.kind is CheckpointKind.LANGUAGE_MODEL
    assert (found.framework, found.format, found.architecture) == ("mlx", "mlx", architecture)
    assert found.num_parameters == num_parameters(tmp_path)
    assert found.weight_files == (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    )
    assert found.weight_bytes == sum(tensor.nbytes for tensor in found.tensors.values())
    assert found.has_tokenizer
    quantized = f"{quantize_bits}-bit quantized " if quantize_bits else ""
    assert found.description.startswith(f"a {quantized}{architecture} language model, ")
    assert found.description.endswith(" parameters, 2 weight files, tokenizer included")
    if quantize_bits:
        assert found.quantization is not None
        bits_per_weight = found.quantization["bits_per_weight"]
        assert found.quantization == {
            "bits": 4, "group_size": 32, "mode": "affine", "bits_per_weight": bits_per_weight
        }  # fmt: skip
        assert 5 <= bits_per_weight < 7  # with 16-bit scales and zero points; norms are not packed
        assert set(found.dtypes) == {"BF16", "U32"}
    else:
        assert found.quantization is None
        assert found.dtypes == ("BF16",)


@pytest.mark.parametrize("quantize_bits", [2, 3, 5, 6, 8])
def test_all_widths_of_quantization(tmp_path: Path, quantize_bits: int) -> None:
    write_language_model(tmp_path, quantize_bits=quantize_bits)
    assert recognise(tmp_path).num_parameters == num_parameters(tmp_path)


def test_a_transformers_checkpoint_and_no_tokenizer(tmp_path: Path) -> None:
    write_language_model(tmp_path, metadata_format="pt", with_tokenizer=False)
    found = recognise(tmp_path)
    assert (found.framework, found.format) == ("transformers", "transformers")
    assert not found.has_tokenizer
    assert found.description.endswith("1 weight file, no tokenizer")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 64),
        ("vocab_size", vocabulary_size() + 1),
        ("num_hidden_layers", 3),
        ("intermediate_size", 32),
        ("num_key_value_heads", 2),
    ],
)
@pytest.mark.parametrize("quantize_bits", [None, 8])
def test_a_config_that_does_not_match(
    tmp_path: Path, quantize_bits: int | None, field: str, value: Any
) -> None:
    write_language_model(tmp_path, quantize_bits=quantize_bits)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(PackagingError, match=r"config\.json does not match the weights"):
        recognise(tmp_path)


def test_a_layer_quantized_otherwise_than_the_default_is_accepted(tmp_path: Path) -> None:
    """mlx-lm loads it: it takes the width from the model, not from the default."""
    from mlx_lm.utils import load_model

    write_language_model(tmp_path, quantize_bits=8)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization"] = {"bits": 4, "group_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    load_model(tmp_path)
    assert recognise(tmp_path).architecture == "llama"


@pytest.mark.parametrize("quantize_bits", [None, 4, 8])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "mixtral"])
def test_adapters_fit_their_base(
    tmp_path: Path, architecture: str, quantize_bits: int | None
) -> None:
    base = tmp_path / "base"
    write_language_model(base, architecture=architecture, quantize_bits=quantize_bits)
    base_found = recognise(base)
    for name, folder in {
        "all": write_lora_adapter(tmp_path / "all", base, rank=3, scale=1.5),
        "last": write_lora_adapter(tmp_path / "last", base, num_layers=1),
        "embedding": write_lora_adapter(tmp_path / "emb", base, keys=["model.embed_tokens"]),
        "peft": write_peft_adapter(tmp_path / "peft", base, target_modules=["q_proj", "o_proj"]),
    }.items():
        found = recognise(folder)
        assert found.adapter is not None, name
        assert found.adapter.base_model == str(base)
        check_adapter_fits(found, base_found)
        assert not adapter_delta_is_zero(found)
        read = {key for m in found.adapter.modules.values() for key in (m.key_a, m.key_b)}
        assert read == set(found.tensors)


def test_dora_adapters(tmp_path: Path) -> None:
    base = write_language_model(tmp_path / "base")
    for folder in (
        write_lora_adapter(tmp_path / "mlx", base, dora=True),
        write_lora_adapter(tmp_path / "emb", base, dora=True, keys=["model.embed_tokens"]),
        write_peft_adapter(tmp_path / "peft", base, dora=True),
    ):
        found = recognise(folder)
        assert found.adapter is not None
        assert found.adapter.fine_tune_type == "dora"
        check_adapter_fits(found, recognise(base))


def test_an_untrained_adapter_does_nothing(tmp_path: Path) -> None:
    base = write_language_model(tmp_path / "base")
    assert adapter_delta_is_zero(recognise(write_lora_adapter(tmp_path / "a", base, zero=True)))


@pytest.mark.parametrize("quantize_bits", [None, 4])
def test_an_adapter_for_another_base_is_refused(tmp_path: Path, quantize_bits: int | None) -> None:
    base = write_language_model(tmp_path / "base", quantize_bits=quantize_bits)
    wider = write_language_model(tmp_path / "wider", hidden=64, quantize_bits=quantize_bits)
    deeper = write_language_model(tmp_path / "deeper", layers=3, quantize_bits=quantize_bits)
    for other, told in (
        (wider, r"belongs to another base model .* takes 64 and gives"),
        (deeper, r"layers up to 2 \(counted from 0\), and the base has 2 layers"),
    ):
        for writer in (write_lora_adapter, write_peft_adapter):
            adapter = recognise(writer(tmp_path / f"{writer.__name__}-{other.name}", other))
            with pytest.raises(PackagingError, match=told):
                check_adapter_fits(adapter, recognise(base))


def test_peft_adapters_of_a_transformers_mixture_are_left_to_the_loader(tmp_path: Path) -> None:
    """mlx-lm stacks experts when it loads; the files on disk still have them one by one."""
    base = write_language_model(tmp_path / "base", architecture="mixtral")
    adapter = recognise(write_lora_adapter(tmp_path / "adapter", base))
    unstack_experts(base)
    found = recognise(base)
    assert found.framework == "transformers"
    check_adapter_fits(adapter, found)


def unstack_experts(folder: Path) -> None:
    import mlx.core as mx

    stacked = mx.load(str(folder / "model.safetensors"))
    weights = {}
    for name, array in stacked.items():
        head, found, tail = name.partition("switch_mlp.")
        if not found:
            weights[name] = array
            continue
        part = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[tail.partition(".")[0]]
        for number in range(array.shape[0]):
            weights[f"{head}experts.{number}.{part}.weight"] = array[number]
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").unlink()


def test_recognising_imports_no_framework_and_reads_no_weights(tmp_path: Path) -> None:
    base = write_language_model(tmp_path / "base", shards=2, quantize_bits=4)
    adapter = write_lora_adapter(tmp_path / "adapter", base)
    program = """
import sys, time
from mlops.checkpoints import adapter_delta_is_zero, check_adapter_fits, recognise
base, adapter = recognise(sys.argv[1]), recognise(sys.argv[2])
check_adapter_fits(adapter, base)
adapter_delta_is_zero(adapter)
heavy = {"mlx", "mlx_lm", "torch", "transformers", "huggingface_hub", "numpy", "bentoml"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(base), str(adapter)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[]"


def test_a_model_larger_than_memory_is_recognised_at_once(tmp_path: Path) -> None:
    end = write_hollow_llama(tmp_path, head_dim=1)
    found = recognise(tmp_path)
    assert found.weight_bytes == end > 2 * 2**40
    assert "549.8B parameters" in found.description
