"""mlx-lm's and PEFT's adapters are read to the last tensor, or refused by name."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest

from mlops.checkpoints import (
    Checkpoint,
    CheckpointKind,
    adapter_delta_is_zero,
    check_adapter_fits,
    recognise,
)
from mlops.errors import PackagingError
from tiny_models import write_safetensors

Q = "model.layers.0.self_attn.q_proj"
PEFT_Q = f"base_model.model.{Q}"
MLX_TENSORS = {f"{Q}.lora_a": (8, 4), f"{Q}.lora_b": (4, 6)}
PEFT_TENSORS = {f"{PEFT_Q}.lora_A.weight": (4, 8), f"{PEFT_Q}.lora_B.weight": (6, 4)}
MLX_CONFIG: dict[str, Any] = {
    "fine_tune_type": "lora",
    "num_layers": 4,
    "lora_parameters": {"rank": 4, "scale": 2.5, "dropout": 0.0},
    "model": "org/base",
}
PEFT_CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 16,
    "base_model_name_or_path": "org/base",
    "bias": "none",
    "modules_to_save": None,
    "init_lora_weights": True,
}


def mlx_adapter(folder: Path, shapes: Any = MLX_TENSORS, fill: int = 1, **changes: Any) -> Path:
    return write(folder, "adapters.safetensors", shapes, MLX_CONFIG | changes, fill)


def peft_adapter(folder: Path, shapes: Any = PEFT_TENSORS, **changes: Any) -> Path:
    return write(folder, "adapter_model.safetensors", shapes, PEFT_CONFIG | changes)


def write(folder: Path, file: str, shapes: Any, config: Any, fill: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / file, shapes, fill=fill)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def refused(path: Path, *parts: str) -> PackagingError:
    with pytest.raises(PackagingError) as caught:
        recognise(path)
    for part in parts:
        assert part in caught.value.message
    assert caught.value.operation == "recognise"
    json.dumps(caught.value.details)
    return caught.value


def test_an_mlx_lm_adapter(tmp_path: Path) -> None:
    found = recognise(mlx_adapter(tmp_path))
    assert found.kind is CheckpointKind.ADAPTER
    assert (found.format, found.framework) == ("mlx-lm adapter", "mlx")
    assert found.weight_files == ("adapters.safetensors",)
    assert found.description == "a rank-4 LoRA adapter of 1 module for org/base, 56 parameters"
    assert found.adapter is not None
    assert found.adapter.base_model == "org/base"
    (module,) = found.adapter.modules.values()
    assert (module.name, module.rank, module.scale) == (Q, 4, 2.5)
    assert (module.in_features, module.out_features, module.transposed) == (8, 6, False)
    assert module.file == (tmp_path / "adapters.safetensors").resolve()
    assert (module.key_a, module.key_b, module.key_m) == (f"{Q}.lora_a", f"{Q}.lora_b", None)


def test_a_peft_adapter(tmp_path: Path) -> None:
    found = recognise(peft_adapter(tmp_path))
    assert (found.format, found.framework) == ("peft adapter", "transformers")
    assert found.adapter is not None
    assert found.adapter.base_model == "org/base"
    (module,) = found.adapter.modules.values()
    assert (module.name, module.rank, module.scale) == (Q, 4, 4.0)
    assert (module.in_features, module.out_features, module.transposed) == (8, 6, True)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"r": 64}, "the rank 64 (r), and its tensors have 4"),
        ({"rank_pattern": {r".*\.q_proj": 2}}, "the rank 2 (rank_pattern)"),
    ],
)
def test_another_rank_than_the_tensors_is_refused(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    """PEFT loads no such adapter, and nobody can say which rank it was scaled with."""
    refused(peft_adapter(tmp_path, **changes), told, Q)


@pytest.mark.parametrize(
    "changes", [{"r": 64, "rank_pattern": {"q_proj": 4}}, {"r": None}, {"rank_pattern": {"k": 7}}]
)
def test_the_rank_pattern_goes_before_the_rank(tmp_path: Path, changes: dict[str, Any]) -> None:
    adapter = recognise(peft_adapter(tmp_path, **changes)).adapter
    assert adapter is not None
    assert adapter.modules[Q].scale == 16 / 4


@pytest.mark.parametrize("rank", [0, -1, "4", True, 4.0])
def test_a_rank_that_is_none(tmp_path: Path, rank: Any) -> None:
    refused(peft_adapter(tmp_path, r=rank), "r in adapter_config.json is")
    refused(peft_adapter(tmp_path, rank_pattern={"q_proj": rank}), "rank_pattern")


def test_rank_stabilised_lora_scales_by_the_root_of_the_rank(tmp_path: Path) -> None:
    adapter = recognise(peft_adapter(tmp_path, use_rslora=True)).adapter
    assert adapter is not None
    assert adapter.modules[Q].scale == 16 / math.sqrt(4)


@pytest.mark.parametrize(
    ("pattern", "scale"),
    [
        ({"q_proj": 2}, 0.5),
        ({"self_attn.q_proj": 2}, 0.5),
        ({f"^{Q}": 2}, 0.5),
        ({Q.replace(".", "\\."): 2}, 0.5),
        ({"^self_attn.q_proj": 2}, 4.0),
        ({"j": 2}, 4.0),
        ({"v_proj": 2}, 4.0),
        (None, 4.0),
    ],
)
def test_alphas_by_module(tmp_path: Path, pattern: Any, scale: float) -> None:
    adapter = recognise(peft_adapter(tmp_path, alpha_pattern=pattern)).adapter
    assert adapter is not None
    assert adapter.modules[Q].scale == scale


@pytest.mark.parametrize("pattern", [{"(a+": 1}, {"q_proj": "2"}, {"q_proj": None}, [1], "x"])
def test_an_alpha_pattern_that_cannot_be_read(tmp_path: Path, pattern: Any) -> None:
    refused(peft_adapter(tmp_path, alpha_pattern=pattern), "alpha_pattern")


def test_dora_in_both_formats(tmp_path: Path) -> None:
    mlx = mlx_adapter(tmp_path / "mlx", MLX_TENSORS | {f"{Q}.m": (6,)}, fine_tune_type="dora")
    peft_tensors = PEFT_TENSORS | {f"{PEFT_Q}.lora_magnitude_vector": (6,)}
    peft = peft_adapter(tmp_path / "peft", peft_tensors, use_dora=True)
    for folder, key in ((mlx, f"{Q}.m"), (peft, f"{PEFT_Q}.lora_magnitude_vector")):
        found = recognise(folder)
        assert found.adapter is not None
        assert found.adapter.fine_tune_type == "dora"
        assert found.adapter.modules[Q].key_m == key
        assert "DoRA" in found.description


def test_stacked_experts_and_embeddings(tmp_path: Path) -> None:
    experts = "model.layers.0.mlp.switch_mlp.up_proj"
    shapes = {
        f"{experts}.lora_a": (3, 4, 8),
        f"{experts}.lora_b": (3, 16, 4),
        "model.embed_tokens.lora_a": (10, 2),
        "model.embed_tokens.lora_b": (2, 8),
    }
    adapter = recognise(mlx_adapter(tmp_path, shapes)).adapter
    assert adapter is not None
    module = adapter.modules[experts]
    assert (module.num_experts, module.rank, module.transposed) == (3, 4, True)
    assert (module.in_features, module.out_features) == (8, 16)
    embedding = adapter.modules["model.embed_tokens"]
    assert (embedding.in_features, embedding.out_features, embedding.rank) == (10, 8, 2)
    assert adapter.rank == 4


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"fine_tune_type": "full"}, "is a full fine-tune, not an adapter"),
        ({"fine_tune_type": "loha"}, "'loha'"),
        ({"lora_parameters": {"rank": 4}}, "lora_parameters.scale"),
        ({"lora_parameters": {"rank": 4, "scale": "2"}}, "lora_parameters.scale"),
        ({"lora_parameters": {"rank": 4, "scale": float("nan")}}, "lora_parameters.scale"),
        ({"lora_parameters": {"rank": 4, "scale": 10**400}}, "lora_parameters.scale"),
        ({"lora_parameters": []}, "lora_parameters.scale"),
    ],
)
def test_mlx_lm_adapters_that_are_refused(
    tmp_path: Path, changes: dict[str, Any], part: str
) -> None:
    refused(mlx_adapter(tmp_path, **changes), part)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("peft_type", kind) for kind in ("LOHA", "IA3", "VERA", "ADALORA", "PREFIX_TUNING")),
        ("task_type", "SEQ_CLS"),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("layer_replication", [[0, 4]]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", ["x"]),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["experts.up"]),
        ("lora_bias", True),
        ("alora_invocation_tokens", [1]),
        ("use_qalora", True),
        ("use_something_new", True),
    ],
)
def test_peft_adapters_that_are_refused_by_name(tmp_path: Path, setting: str, value: Any) -> None:
    error = refused(peft_adapter(tmp_path, **{setting: value}), setting)
    assert error.details["setting"] == setting


@pytest.mark.parametrize("alpha", [None, "16", True, float("inf")])
def test_a_peft_adapter_without_alpha(tmp_path: Path, alpha: Any) -> None:
    refused(peft_adapter(tmp_path, lora_alpha=alpha), "lora_alpha")


@pytest.mark.parametrize(
    "stranger",
    [
        "base_model.model.lm_head.weight",
        "base_model.model.lm_head.base_layer.bias",
        f"{PEFT_Q}.lora_B.bias",
        f"{PEFT_Q}.lora_magnitude_vector",
        "nonsense",
    ],
)
def test_every_tensor_must_belong_to_a_module(tmp_path: Path, stranger: str) -> None:
    error = refused(
        peft_adapter(tmp_path, PEFT_TENSORS | {stranger: (6,)}), "no part of a LoRA", stranger
    )
    assert error.details["tensors"] == [stranger]


@pytest.mark.parametrize(
    ("shapes", "part"),
    [
        ({f"{Q}.lora_a": (8, 4)}, f"has no B for {Q}"),
        ({f"{Q}.lora_b": (4, 6)}, f"has no A for {Q}"),
        ({f"{Q}.lora_a": (8, 4), f"{Q}.lora_b": (5, 6)}, "A has rank 4, B has rank 5"),
        ({f"{Q}.lora_a": (8,), f"{Q}.lora_b": (4,)}, "do not go together"),
        ({f"{Q}.lora_a": (2, 4, 8), f"{Q}.lora_b": (3, 6, 4)}, "do not go together"),
        ({f"{Q}.lora_a": (8, 0), f"{Q}.lora_b": (0, 6)}, "without values"),
        (MLX_TENSORS | {f"{Q}.m": (6,)}, "no part of a LoRA"),
        ({}, "holds no tensors"),
    ],
)
def test_a_and_b_must_pair_up(tmp_path: Path, shapes: Any, part: str) -> None:
    refused(mlx_adapter(tmp_path, shapes), part)


@pytest.mark.parametrize("empty", [(0,), (0, 8), (4, 0), (0, 0)])
@pytest.mark.parametrize("part", ["A", "B"])
def test_tensors_that_were_not_gathered(tmp_path: Path, part: str, empty: tuple[int, ...]) -> None:
    """As DeepSpeed's ZeRO-3 leaves them in an adapter that was saved from one device."""
    shapes = PEFT_TENSORS | {f"{PEFT_Q}.lora_{part}.weight": empty}
    error = refused(
        peft_adapter(tmp_path, shapes),
        "holds tensors without values",
        "ZeRO-3",
        "stage3_gather_16bit_weights_on_model_save",
        "zero_to_fp32.py",
    )
    assert error.details["tensors"] == [f"{PEFT_Q}.lora_{part}.weight"]


@pytest.mark.parametrize(
    ("strangers", "hint"),
    [
        ([f"{PEFT_Q}.lora_B.bias"], "biases are not supported"),
        (["base_model.model.lm_head.base_layer.bias"], "save_embedding_layers=False"),
        (["base_model.model.lm_head.weight"], "they are whole weights"),
        ([f"{PEFT_Q}.lora_magnitude_vector"], "does not say that the adapter is one"),
    ],
)
def test_tensors_that_are_no_part_of_a_lora_are_called_what_they_are(
    tmp_path: Path, strangers: list[str], hint: str
) -> None:
    tensors = PEFT_TENSORS | dict.fromkeys(strangers, (6,))
    refused(peft_adapter(tmp_path, tensors), "no part of a LoRA", hint)


def test_the_other_formats_names_and_those_of_early_mlx_vlm(tmp_path: Path) -> None:
    refused(mlx_adapter(tmp_path / "a", PEFT_TENSORS), "called adapter_model.safetensors")
    refused(peft_adapter(tmp_path / "b", MLX_TENSORS), "called adapters.safetensors")
    early = {
        f"language_model.{Q}.{part}": shape
        for part, shape in zip("AB", [(8, 4), (4, 6)], strict=True)
    }
    refused(mlx_adapter(tmp_path / "c", early), "early versions of mlx-vlm")


def test_dora_needs_its_magnitudes(tmp_path: Path) -> None:
    refused(mlx_adapter(tmp_path / "a", fine_tune_type="dora"), "has no magnitude")
    wrong = MLX_TENSORS | {f"{Q}.m": (5,)}
    refused(mlx_adapter(tmp_path / "b", wrong, fine_tune_type="dora"), "do not go together")


def test_tensors_that_are_no_floats(tmp_path: Path) -> None:
    mlx_adapter(tmp_path)
    write_safetensors(tmp_path / "adapters.safetensors", MLX_TENSORS, dtype="I32")
    refused(tmp_path, "is I32")


def test_weights_without_a_config(tmp_path: Path) -> None:
    (mlx_adapter(tmp_path) / "adapter_config.json").unlink()
    refused(tmp_path, "has adapters.safetensors but no adapter_config.json")


def test_a_config_without_the_final_weights(tmp_path: Path) -> None:
    mlx_adapter(tmp_path)
    (tmp_path / "adapters.safetensors").rename(tmp_path / "0000100_adapters.safetensors")
    refused(tmp_path, "copy the checkpoint that you want")


def test_two_adapters_in_one_folder(tmp_path: Path) -> None:
    mlx_adapter(tmp_path)
    peft_adapter(tmp_path)
    refused(tmp_path, "holds two adapters")


def delta_is_zero(folder: Path, a: bytes, b: bytes, dtype: str, **changes: Any) -> bool:
    """Whether an adapter with one A of shape (1, n) and one B of the same does nothing."""
    width = {"F32": 4, "BF16": 2, "F16": 2}[dtype]
    header = {
        f"{Q}.lora_a": {"dtype": dtype, "shape": [len(a) // width, 1], "data_offsets": [0, len(a)]},
        f"{Q}.lora_b": {
            "dtype": dtype,
            "shape": [1, len(b) // width],
            "data_offsets": [len(a), len(a) + len(b)],
        },
    }
    raw = json.dumps(header).encode()
    mlx_adapter(folder, **changes)
    (folder / "adapters.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + a + b)
    return adapter_delta_is_zero(recognise(folder))


@pytest.mark.parametrize(
    ("b", "dtype", "expected"),
    [
        (bytes(4000), "F32", True),
        (struct.pack("<3f", 0.0, -0.0, 0.0), "F32", True),
        (struct.pack("<3e", 0.0, -0.0, 0.0), "F16", True),
        (b"\x00\x00\x00\x80", "BF16", True),
        (struct.pack("<3f", 0.0, 0.0, 1e-45), "F32", False),
        (struct.pack("<3f", 0.0, 0.0, -1.0), "F32", False),
        (b"\x00\x00\x80\x00", "BF16", False),
        (bytes(3 * 2**20) + struct.pack("<f", 1.0), "F32", False),
    ],
)
def test_an_adapter_whose_b_is_zero_does_nothing(
    tmp_path: Path, b: bytes, dtype: str, expected: bool
) -> None:
    a = struct.pack("<f", 1.0)
    assert delta_is_zero(tmp_path, a, b, dtype) is expected


def test_zero_a_or_a_zero_scale_does_nothing_either(tmp_path: Path) -> None:
    one = struct.pack("<f", 1.0)
    assert delta_is_zero(tmp_path, bytes(4), one, "F32")
    assert delta_is_zero(tmp_path, one, one, "F32", lora_parameters={"scale": 0})
    assert not delta_is_zero(tmp_path, one, one, "F32")


def base_model(folder: Path, **shapes: tuple[int, ...]) -> Checkpoint:
    """A base of one kind that only names tell apart (phi: no completeness check)."""
    folder.mkdir(exist_ok=True)
    tensors = {"model.layers.0.self_attn.q_proj.weight": (6, 8)} | shapes
    write_safetensors(folder / "model.safetensors", tensors, metadata={"format": "mlx"})
    config = {"model_type": "phi", "hidden_size": 8, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return recognise(folder)


def test_an_adapter_of_its_base_fits(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    check_adapter_fits(recognise(mlx_adapter(tmp_path / "mlx")), base)
    check_adapter_fits(recognise(peft_adapter(tmp_path / "peft")), base)


@pytest.mark.parametrize(
    ("shapes", "part"),
    [
        ({f"{Q}.lora_a": (9, 4), f"{Q}.lora_b": (4, 6)}, "it takes 9 and gives 6 values"),
        ({f"{Q}.lora_a": (8, 4), f"{Q}.lora_b": (4, 7)}, "it takes 8 and gives 7 values"),
        ({f"{Q}.lora_a": (2, 4, 8), f"{Q}.lora_b": (2, 6, 4)}, "the base's weight is [6, 8]"),
    ],
)
def test_an_adapter_of_another_base_is_refused(tmp_path: Path, shapes: Any, part: str) -> None:
    base = base_model(tmp_path / "base")
    adapter = recognise(mlx_adapter(tmp_path / "adapter", shapes))
    with pytest.raises(PackagingError, match="belongs to another base model") as caught:
        check_adapter_fits(adapter, base)
    assert part in caught.value.message
    assert caught.value.operation == "check_adapter_fits"
    assert caught.value.details["base"] == str(base.path)
    assert caught.value.details["tensors"] == [min(shapes)]


@pytest.mark.parametrize(
    ("modules", "told"),
    [
        (["x"], "the base has no x; the base has layers"),
        (["model.layers.0.attn.q"], "no model.layers.0.attn.q; in the base's layers.0 there is"),
        ([f"model.layers.{n}.self_attn.q_proj" for n in range(32)],
         "it changes layers up to 31 (counted from 0), and the base has 1 layer. It was trained on "
         "org/base"),
        (["model.layers.0.mlp.gate_proj"], "changes gate_proj of layers.0.mlp on its own, and the"),
        (["model.layers.0.self_attn.qkv_proj"], "q_proj, k_proj, v_proj in one, and the base has"),
        (["lm_head"], "the base has no lm_head: its output layer is its embedding"),
        (["model.m1", "model.m2", "model.k"], "no model.m1; the base has layers (and 1 more like"),
        (list("abcde"), "and 2 more"),
    ],
)  # fmt: skip
def test_the_reason_names_what_is_missing(tmp_path: Path, modules: list[str], told: str) -> None:
    shapes = {"a": (8, 4), "b": (4, 6)}
    tensors = {f"{name}.lora_{x}": shapes[x] for name in modules for x in "ab"}
    adapter = recognise(mlx_adapter(tmp_path / "adapter", tensors))
    leaves = ("self_attn.k_proj", "self_attn.v_proj", "mlp.gate_up_proj")
    weights = {f"model.layers.0.{leaf}.weight": (6, 8) for leaf in leaves}
    base = base_model(tmp_path / "base", **weights)
    with pytest.raises(PackagingError, match="does not fit") as caught:
        check_adapter_fits(adapter, base)
    assert told in caught.value.message
    assert "another base" not in caught.value.message
    absent = sorted(f"{name}.lora_a" for name in modules if name != Q)
    assert caught.value.details["tensors"] == absent[:3]


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    adapter = recognise(mlx_adapter(tmp_path / "a"))
    with pytest.raises(PackagingError, match="not a language model"):
        check_adapter_fits(adapter, adapter)
    base = base_model(tmp_path / "base")
    for ask in (lambda: check_adapter_fits(base, base), lambda: adapter_delta_is_zero(base)):
        with pytest.raises(PackagingError, match="is not an adapter"):
            ask()
