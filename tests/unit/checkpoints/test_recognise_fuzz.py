"""Whatever a configuration says, the answer is a checkpoint or `PackagingError`."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlops.checkpoints import adapter_delta_is_zero, check_adapter_fits, recognise
from mlops.errors import PackagingError
from tiny_models import write_safetensors

Q = "model.layers.0.self_attn.q_proj"
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**9, 10**400, 1, 2, 4, 8])
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["llama", "phi", "q_proj", "\ud800", "lora", "LORA"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=6) | st.sampled_from(["bits", "scale", Q]), inner)
    ),
    max_leaves=6,
)
fuzz = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MODEL = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1}
MODEL_KEYS = [
    "model_type", "hidden_size", "num_hidden_layers", "num_layers", "vocab_size", "head_dim",
    "intermediate_size", "num_attention_heads", "num_key_value_heads", "quantization",
    "quantization_config", "text_config", "architectures", "tie_word_embeddings", "auto_map",
]  # fmt: skip
MLX = {"lora_parameters": {"scale": 1.0}}
MLX_KEYS = ["fine_tune_type", "lora_parameters", "model", "num_layers"]
PEFT = {"peft_type": "LORA", "lora_alpha": 4}
PEFT_KEYS = [
    "peft_type", "r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "use_dora",
    "bias", "modules_to_save", "init_lora_weights", "base_model_name_or_path", "use_new",
]  # fmt: skip


def changes(keys: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(keys), values, max_size=4)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shapes = {
        f"{Q}.weight": (6, 1),
        f"{Q}.scales": (6, 1),
        "model.embed_tokens.weight": (10, 8),
    }
    write_safetensors(tmp_path / "model.safetensors", shapes, dtype="U32")
    return tmp_path


@fuzz
@given(config=changes(MODEL_KEYS))
def test_any_model_config(model: Path, config: dict[str, Any]) -> None:
    (model / "config.json").write_text(json.dumps(MODEL | config))
    with suppress(PackagingError):
        str(recognise(model))


@fuzz
@given(index=values)
def test_any_index(model: Path, index: Any) -> None:
    (model / "config.json").write_text(json.dumps(MODEL))
    content = json.dumps({"weight_map": index})
    (model / "model.safetensors.index.json").write_text(content)
    with suppress(PackagingError):
        str(recognise(model))


@fuzz
@given(config=changes(MLX_KEYS) | changes(PEFT_KEYS), is_peft=st.booleans())
def test_any_adapter_config(
    tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any], is_peft: bool
) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    if is_peft:
        prefix = f"base_model.model.{Q}"
        shapes = {f"{prefix}.lora_A.weight": (2, 8), f"{prefix}.lora_B.weight": (6, 2)}
        write_safetensors(folder / "adapter_model.safetensors", shapes)
    else:
        shapes = {f"{Q}.lora_a": (8, 2), f"{Q}.lora_b": (2, 6)}
        write_safetensors(folder / "adapters.safetensors", shapes)
    content = json.dumps((PEFT if is_peft else MLX) | config)
    (folder / "adapter_config.json").write_text(content)
    with suppress(PackagingError):
        adapter = recognise(folder)
        str(adapter)
        adapter_delta_is_zero(adapter)
        check_adapter_fits(adapter, adapter)
