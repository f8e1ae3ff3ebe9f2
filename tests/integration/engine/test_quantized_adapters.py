"""Adapters of experts and of tied output layers over a quantized base: as over the same weights in
float32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tiny_models
import transformers_forms
from mlops.checkpoints import recognise
from mlops.engine.banks import AdapterBanks
from mlops.engine.owner import run_in_owner

PROMPTS = np.array([[72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100]] * 4)


def dequantized(folder: Path, base: Path) -> Path:
    """The same weights as the quantized ones of `base`, in float32."""
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model

    from mlops.engine.layers import dequantized_weight

    def read() -> dict[str, Any]:
        model = load_model(base)[0]
        weights = dict(tree_flatten(model.parameters()))
        for name, layer in model.named_modules():
            if "scales" in layer:
                weights[f"{name}.weight"] = dequantized_weight(layer)
                del weights[f"{name}.scales"], weights[f"{name}.biases"]
        return {name: np.array(array) for name, array in weights.items()}

    shutil.copytree(base, folder)
    (folder / "model.safetensors.index.json").unlink()
    save_file(run_in_owner(read), folder / "model.safetensors", metadata={"format": "mlx"})
    config = json.loads((base / "config.json").read_text())
    del config["quantization"], config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_ends_adapter(folder: Path, base: Path) -> Path:
    """Of the embedding and of the output layer that is tied to it, each its own."""
    num_rows, hidden = load_file(base / "model.safetensors")["model.embed_tokens.weight"].shape
    source = np.random.default_rng(1)
    shapes = {
        "lm_head.lora_A.weight": (4, hidden),
        "lm_head.lora_B.weight": (num_rows, 4),
        "model.embed_tokens.lora_embedding_A": (4, num_rows),
        "model.embed_tokens.lora_embedding_B": (hidden, 4),
    }
    tensors = {
        f"base_model.model.{name}": 0.3 * source.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_adapters(folder: Path, architecture: str, base: Path) -> list[Path]:
    if architecture != "mixtral":
        return [write_ends_adapter(folder / "ends", base)]
    form = transformers_forms.write_transformers_form(folder / "form", base)
    write = transformers_forms.write_expert_adapter
    return [
        write(folder / "all", form),
        write(folder / "some", form, absent=[0, 2], ranks={1: 2}, seed=4),
    ]


def logits_of(base: Path, adapters: list[Path]) -> Any:
    """(rows, tokens, vocabulary): the base's, then each adapter's, in one batch."""
    from mlx_lm.utils import load_model

    def compute() -> Any:
        import mlx.core as mx

        model = load_model(base)[0]
        banks = AdapterBanks(model, recognise(base), "cpu")
        slots = [0] + [banks.load(path.name, recognise(path)) for path in adapters]
        banks.use(banks.select(slots))
        return np.array(model(mx.array(PROMPTS[: len(slots)])))

    return run_in_owner(compute)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3"])
def test_a_quantized_base_computes_as_its_weights_in_float32(
    tmp_path: Path, architecture: str
) -> None:
    base = tiny_models.write_language_model(
        tmp_path / "base",
        architecture=architecture,
        quantize_bits=4,
        tie_word_embeddings=architecture == "qwen3",
    )
    full = dequantized(tmp_path / "float32", base)
    adapters = write_adapters(tmp_path, architecture, full)
    ours, expected = logits_of(base, adapters), logits_of(full, adapters)
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)
    for row in expected[1:]:
        assert np.abs(row - expected[0]).max() > 0.1, "the adapter changes nothing"
