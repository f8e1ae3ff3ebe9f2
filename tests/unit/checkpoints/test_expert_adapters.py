"""Adapters of experts go to the linears that they were trained on, or are refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mlops.checkpoints import (
    Checkpoint,
    CheckpointKind,
    TensorInfo,
    check_adapter_fits,
    recognise,
)
from mlops.checkpoints.expert_adapters import ExpertLinear, ExpertLinears
from mlops.errors import PackagingError
from tiny_models import write_safetensors

HIDDEN, WIDTH, EXPERTS, RANK = 8, 6, 3, 2
BLOCK = "model.layers.0.mlp.experts"
Shapes = dict[str, tuple[int, ...]]


def one_by_one(block: str = BLOCK, leaves: str = "gate_proj up_proj down_proj") -> Shapes:
    gate, up, down = leaves.split()
    return {
        f"{block}.{number}.{leaf}.weight": (HIDDEN, WIDTH) if leaf == down else (WIDTH, HIDDEN)
        for number in range(EXPERTS)
        for leaf in (gate, up, down)
    }


def stacked(block: str) -> Shapes:
    both = (EXPERTS, WIDTH, HIDDEN)
    return {
        f"{block}.gate_proj.weight": both,
        f"{block}.up_proj.weight": both,
        f"{block}.down_proj.weight": (EXPERTS, HIDDEN, WIDTH),
    }


def fused(block: str = BLOCK) -> Shapes:
    return {
        f"{block}.gate_up_proj": (EXPERTS, HIDDEN, 2 * WIDTH),
        f"{block}.down_proj": (EXPERTS, WIDTH, HIDDEN),
    }


BASES = {
    "one by one": one_by_one(),
    "w1, w3 and w2": one_by_one("model.layers.0.block_sparse_moe.experts", "w1 w3 w2"),
    "stacked": stacked("model.layers.0.mlp.switch_mlp"),
    "stacked as experts": stacked("language_model.model.layers.0.feed_forward.experts"),
    "fused": fused(),
    "in another block": stacked("model.layers.0.experts.switch_glu"),
}


def base(shapes: Mapping[str, tuple[int, ...]], **fields: Any) -> Checkpoint:
    tensors = {name: TensorInfo("F32", shape, "model", 0, 0) for name, shape in shapes.items()}
    return Checkpoint(
        Path("/base"), CheckpointKind.LANGUAGE_MODEL, "mlx", "mlx", "a model", (), 0,
        tensors=tensors, **fields,
    )  # fmt: skip


def adapter(folder: Path, shapes: Mapping[str, tuple[int, ...]], **config: Any) -> Checkpoint:
    write_safetensors(
        folder / "adapter_model.safetensors",
        {f"base_model.model.{name}": shape for name, shape in shapes.items()},
    )
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return recognise(folder)


def low_rank(name: str, num_in: int, num_out: int, rank: int = RANK) -> Shapes:
    return {f"{name}.lora_A.weight": (rank, num_in), f"{name}.lora_B.weight": (num_out, rank)}


def parameters(block: str = BLOCK, experts: int = EXPERTS, width: int = WIDTH) -> Shapes:
    """What PEFT writes for both parameters of a block: the first one is the inner one."""
    return {
        **low_rank(f"{block}.base_layer", HIDDEN, 2 * width, RANK * experts),
        **low_rank(block, width, HIDDEN, RANK * experts),
    }


TARGETS = {"target_parameters": ["mlp.experts.gate_up_proj", "experts.down_proj"]}
ADAPTERS: dict[str, tuple[Shapes, dict[str, Any]]] = {
    "an expert": (low_rank(f"{BLOCK}.1.gate_proj", HIDDEN, WIDTH), {}),
    "an expert of Mixtral": (
        low_rank("model.layers.0.block_sparse_moe.experts.2.w2", WIDTH, HIDDEN), {},
    ),
    "lists of linears": (
        low_rank(f"{BLOCK}.gate_up_projs.1", HIDDEN, 2 * WIDTH)
        | low_rank(f"{BLOCK}.down_projs.2", WIDTH, HIDDEN),
        {},
    ),
    "parameters": (parameters(), TARGETS),
    "a parameter": (
        low_rank(BLOCK, WIDTH, HIDDEN, RANK * EXPERTS),
        {"target_parameters": ["mlp.experts.down_proj"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("base_name", BASES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_experts_are_found_however_the_base_has_them(
    tmp_path: Path, name: str, base_name: str
) -> None:
    shapes, config = ADAPTERS[name]
    check_adapter_fits(adapter(tmp_path, shapes, **config), base(BASES[base_name]))


@pytest.mark.parametrize("base_name", BASES)
def test_mlx_lms_stacked_experts_fit_as_well(tmp_path: Path, base_name: str) -> None:
    name = "model.layers.0.mlp.switch_mlp.up_proj"
    settings = {"fine_tune_type": "lora", "lora_parameters": {"scale": 2.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    for num_experts in (EXPERTS, EXPERTS + 1):
        write_safetensors(
            tmp_path / "adapters.safetensors",
            {
                f"{name}.lora_a": (num_experts, RANK, HIDDEN),
                f"{name}.lora_b": (num_experts, WIDTH, RANK),
            },
        )
        stacks = recognise(tmp_path)
        if num_experts == EXPERTS:
            check_adapter_fits(stacks, base(BASES[base_name]))
        else:
            with pytest.raises(PackagingError, match="for 4 experts, the base has 3"):
                check_adapter_fits(stacks, base(BASES[base_name]))


def test_what_parameters_are_read_as(tmp_path: Path) -> None:
    config = TARGETS | {"rank_pattern": {"down_proj": 1}, "alpha_pattern": {"gate_up_proj": 3}}
    shapes = parameters() | low_rank(BLOCK, WIDTH, HIDDEN, EXPERTS)
    info = adapter(tmp_path, shapes, **config).adapter
    assert info is not None
    inner, outer = (info.modules[f"{BLOCK}.{leaf}"] for leaf in ("gate_up_proj", "down_proj"))
    assert (inner.rank, inner.num_experts, inner.scale) == (RANK, EXPERTS, 1.5)
    assert (outer.rank, outer.num_experts, outer.scale) == (1, EXPERTS, 4.0)
    assert ".base_layer." in inner.key_a
    assert inner.is_side_by_side
    assert outer.is_side_by_side


ROUTER = "model.layers.0.mlp.gate"
REFUSED: dict[str, tuple[Shapes, dict[str, Any]]] = {
    "belongs to another base model .* it takes 8 and gives 7 values": (
        low_rank(f"{BLOCK}.0.up_proj", HIDDEN, 7), {},
    ),
    "the base has 3 experts": (low_rank(f"{BLOCK}.3.up_proj", HIDDEN, WIDTH), {}),
    "under two names": (
        low_rank(f"{BLOCK}.0.up_proj", HIDDEN, WIDTH) | low_rank(f"{BLOCK}.0.w3", HIDDEN, WIDTH),
        {},
    ),
    "gate_up_proj under two names": (
        parameters() | low_rank(f"{BLOCK}.gate_up_proj", HIDDEN, 2 * WIDTH),
        TARGETS,
    ),
    "down_proj under two names": (
        parameters() | low_rank(f"{BLOCK}.0.down_proj", WIDTH, HIDDEN),
        TARGETS,
    ),
    "experts take LoRA only": (
        low_rank(f"{BLOCK}.0.up_proj", HIDDEN, WIDTH)
        | {f"{BLOCK}.0.up_proj.lora_magnitude_vector": (WIDTH,)},
        {"use_dora": True},
    ),
    "it is for 4 experts, the base has 3": (parameters(experts=4), TARGETS),
    "another base model .* it takes 5 and gives 8 values": (parameters(width=5), TARGETS),
    "no multiple of the rank 4": (parameters(), TARGETS | {"r": 4}),
    "is not a list of names": (parameters(), {"target_parameters": "experts.down_proj"}),
    "target_parameters with experts.gate_up_proj_bias": (
        parameters(), {"target_parameters": ["experts.gate_up_proj_bias"]},
    ),
    "for 2 parameters of .*names down_proj": (
        parameters(), {"target_parameters": ["experts.down_proj"]}),
    "layers.1|layers up to 1": (
        low_rank("model.layers.1.mlp.experts.0.up_proj", HIDDEN, WIDTH), {},
    ),
}  # fmt: skip
"""By what the error says."""


@pytest.mark.parametrize("reason", REFUSED)
def test_what_no_expert_takes_is_refused(tmp_path: Path, reason: str) -> None:
    shapes, config = REFUSED[reason]
    with pytest.raises(PackagingError, match=reason) as caught:
        check_adapter_fits(adapter(tmp_path, shapes, **config), base(one_by_one()))
    json.dumps(caught.value.details)


def test_a_square_parameter_alone_does_not_tell_how_it_lies(tmp_path: Path) -> None:
    shapes = low_rank(BLOCK, HIDDEN, HIDDEN, RANK * EXPERTS)
    alone = adapter(tmp_path, shapes, target_parameters=["mlp.experts.down_proj"])
    square = {
        f"{BLOCK}.{leaf}.weight": (EXPERTS, HIDDEN, HIDDEN)
        for leaf in ("gate_proj", "up_proj", "down_proj")
    }
    with pytest.raises(PackagingError, match="is square"):
        check_adapter_fits(alone, base(square))
    shapes |= low_rank(f"{BLOCK}.base_layer", HIDDEN, 2 * HIDDEN, RANK * EXPERTS)
    check_adapter_fits(adapter(tmp_path, shapes, **TARGETS), base(square))


LM_HEAD = low_rank("lm_head", HIDDEN, 20)
EMBEDDING: Shapes = {"model.embed_tokens.weight": (20, HIDDEN)}


@pytest.mark.parametrize(
    "shapes", [EMBEDDING, {"transformer.wte.weight": (20, HIDDEN), "wpe.weight": (9, HIDDEN)}]
)
def test_an_output_layer_may_be_the_embedding(tmp_path: Path, shapes: Shapes) -> None:
    check_adapter_fits(adapter(tmp_path, LM_HEAD), base(shapes))


@pytest.mark.parametrize(
    "shapes",
    [
        {"model.embed_tokens.weight": (21, HIDDEN)},
        {"model.embed_tokens.weight": (20, 9)},
        {"model.layers.0.mlp.up_proj.weight": (20, HIDDEN)},
        EMBEDDING | {"lm_head.weight": (20, 9)},
    ],
)
def test_an_output_layer_that_is_none_of_the_bases_is_refused(
    tmp_path: Path, shapes: Shapes
) -> None:
    with pytest.raises(PackagingError, match="lm_head"):
        check_adapter_fits(adapter(tmp_path, LM_HEAD), base(shapes))


def test_conv1d_lies_as_in_out(tmp_path: Path) -> None:
    fits = adapter(tmp_path, low_rank("transformer.h.0.attn.c_attn", HIDDEN, 24))
    conv1d = base({"h.0.attn.c_attn.weight": (HIDDEN, 24)}, architecture="gpt2")
    linear = base({"model.h.0.attn.c_attn.weight": (24, HIDDEN)}, architecture="gpt2")
    for one in (conv1d, linear):
        check_adapter_fits(fits, base(one_by_one() | shapes_of(one), architecture="gpt2"))
    with pytest.raises(PackagingError, match="takes 24 and gives 8"):
        check_adapter_fits(
            adapter(tmp_path, low_rank("transformer.h.0.attn.c_attn", 24, HIDDEN)), conv1d
        )


def shapes_of(one: Checkpoint) -> Shapes:
    return {name: tensor.shape for name, tensor in one.tensors.items()}


def test_the_layer_and_what_the_linear_does_there_tell_which_one_is_meant() -> None:
    linears = ExpertLinears(
        ExpertLinear(f"model.layers.{layer}.mlp.switch_mlp.{leaf}", 4)
        for layer in (1, 10)
        for leaf in ("gate_proj", "up_proj", "down_proj")
    )

    def found(name: str) -> list[str]:
        return [linear.name.removeprefix("model.layers.") for linear in linears.find(name)]

    assert found("model.layers.1.block_sparse_moe.experts.0.w3") == ["1.mlp.switch_mlp.up_proj"]
    assert found("layers.10.mlp.experts.gate_up_proj") == [
        "10.mlp.switch_mlp.gate_proj",
        "10.mlp.switch_mlp.up_proj",
    ]
    for other in (
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.shared_experts.gate_proj",
        "model.layers.1.mlp.experts.gate",
        "model.layers.2.mlp.experts.gate_proj",
        "mlp.experts.gate_proj",
        "gate_proj",
    ):
        assert found(other) == []
