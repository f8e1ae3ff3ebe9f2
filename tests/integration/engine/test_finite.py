"""Weights, settings and adapters that nothing can be computed with are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_models
from engines import ask_all, running
from mlops import engine
from mlops.checkpoints import recognise
from mlops.engine import GenerationRequest, LoadedModel
from mlops.errors import EngineError, PackagingError, ServiceError


def damage(folder: Path, tensor: str, place: tuple[int, ...], value: float) -> Path:
    """Change one number of a model's weights."""
    from safetensors.numpy import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[tensor][place] = value
    save_file(tensors, file, metadata={"format": "mlx"})
    return folder


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize(
    ("architecture", "tensor", "place"),
    [
        ("llama", "model.embed_tokens.weight", (200, 3)),  # a token that the trial has not
        ("llama", "model.norm.weight", (1,)),
        ("llama", "model.layers.1.mlp.down_proj.weight", (31, 63)),
        ("mixtral", "model.layers.0.block_sparse_moe.switch_mlp.up_proj.weight", (2, 1, 1)),
    ],
)
def test_one_damaged_weight_is_refused_by_name(
    tmp_path: Path, architecture: str, tensor: str, place: tuple[int, ...], value: float
) -> None:
    folder = tiny_models.write_language_model(tmp_path / "model", architecture=architecture)
    damage(folder, tensor, place, value)
    with pytest.raises(ServiceError, match=f"{tensor}: nothing can be computed") as caught:
        engine.load_model(folder)
    assert ("as large as 1e+30" if value == 1e30 else "1 value that is NaN") in str(caught.value)


@pytest.mark.parametrize("memory_budget_bytes", [None, 0])  # dequantized, and as stored
@pytest.mark.parametrize("part", ["scales", "biases"])
def test_a_damaged_scale_of_quantized_weights(
    tmp_path: Path, part: str, memory_budget_bytes: int | None
) -> None:
    folder = tiny_models.write_language_model(tmp_path / "model", quantize_bits=4)
    damage(folder, f"model.layers.0.mlp.up_proj.{part}", (3, 0), np.inf)
    with pytest.raises(ServiceError, match=r"model\.layers\.0\.mlp\.up_proj\."):
        engine.load_model(folder, memory_budget_bytes=memory_budget_bytes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_large_sums_of_halves_are_no_damage(tmp_path: Path, dtype: str) -> None:
    import mlx.core as mx
    from mlx import nn

    from mlops.engine.finite import check_weights

    layer = nn.Linear(8, 100_000, bias=False)
    layer.weight = mx.full(layer.weight.shape, 30.0, getattr(mx, dtype))
    check_weights(layer, tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rope_theta": 0.0}, r"rope_theta is 0"),
        ({"rope_theta": -5.0, "rms_norm_eps": 1e-5}, r"rope_theta is -5\)"),
        ({"rope_theta": float("nan")}, r"rope_theta is nan"),
    ],
)
def test_settings_that_make_nan_are_refused_and_named(
    tmp_path: Path, settings: dict[str, float], said: str
) -> None:
    """These are refused before, when the checkpoint is recognised; the trial sees what is not."""
    folder = tiny_models.write_language_model(tmp_path / "model")
    checkpoint = replace(recognise(folder), model_config=settings)
    with pytest.raises(ServiceError, match=f"logits are not finite .*{said}"):
        engine.load_model(checkpoint)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(PackagingError, match="rope_theta in config.json is .*, not a positive"):
        recognise(folder)


def test_an_adapter_that_makes_logits_infinite_leaves_the_others_alone(
    tmp_path: Path, base: Path, loaded: LoadedModel
) -> None:
    good = tiny_models.write_lora_adapter(tmp_path / "good", base)
    bad = tiny_models.write_lora_adapter(tmp_path / "bad", base, seed=3)
    multiply_b(bad, 1e36)
    ask: Callable[[str | None], Any] = lambda name: GenerationRequest(  # noqa: E731
        (1, 2, 3), max_tokens=4, adapter=name
    )
    with running(loaded, {"good": good, "bad": bad}) as one:
        before = ask_all(one, ask(None), ask("good"))
        with pytest.raises((PackagingError, EngineError), match="logits are not finite"):
            ask_all(one, ask("bad"))
        after = ask_all(one, ask(None), ask("good"))
    assert [r.tokens for r in after] == [r.tokens for r in before]


def multiply_b(adapter: Path, factor: float) -> None:
    from safetensors.numpy import load_file, save_file

    file = adapter / "adapters.safetensors"
    tensors = load_file(file)
    save_file(
        {k: v * np.float32(factor if k.endswith("lora_b") else 1) for k, v in tensors.items()}, file
    )


@pytest.mark.parametrize("scale", [1e37, -2e4, float("inf")])
def test_an_absurd_scale_is_refused_when_packaging(
    tmp_path: Path, base: Path, scale: float
) -> None:
    adapter = tiny_models.write_lora_adapter(tmp_path / "adapter", base, scale=scale)
    with pytest.raises(PackagingError, match=r"scale .*write the (one|scale) that"):
        recognise(adapter)


def test_an_absurd_alpha_is_refused_when_packaging(tmp_path: Path, base: Path) -> None:
    adapter = tiny_models.write_peft_adapter(tmp_path / "adapter", base, alpha=1e6)
    with pytest.raises(PackagingError, match="has the scale 250000 for .*alpha"):
        recognise(adapter)
