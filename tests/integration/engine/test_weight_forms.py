"""Tensors in another form than mlx-lm reads, and experts that it chooses otherwise.

`tests/sweep` compares such models with torch; here is what needs no torch.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import every_architecture
import tiny_models
from mlops.checkpoints import recognise
from mlops.engine.owner import run_in_owner
from mlops.engine.servable import check_loads
from mlops.errors import PackagingError

NUM_GROUPS, NUM_KEPT, NUM_CHOSEN, NUM_EXPERTS = 4, 2, 3, 16


def test_no_expert_of_a_group_that_is_out_is_chosen() -> None:
    """In every module of mlx-lm that has groups, though all scores are negative."""
    selects = run_in_owner(_selects_by_group)
    assert len(selects) >= 8
    logits = np.random.default_rng(0).normal(size=(64, NUM_EXPERTS)).astype(np.float32)
    bias = np.random.default_rng(1).normal(-2, 0.3, NUM_EXPERTS).astype(np.float32)
    expected = _chosen(1 / (1 + np.exp(-logits)) + bias)
    for module, select in selects.items():
        chosen = run_in_owner(_select, select, logits, bias)
        assert [set(row) for row in chosen.tolist()] == expected, module


def test_biases_that_change_no_choice_stay_as_they_are() -> None:
    bias = np.array([0.1, 0.0, 3.0], np.float32)
    assert (run_in_owner(_kept, {"n_group": 8}, bias) == bias).all()
    assert (run_in_owner(_kept, {"n_group": 1}, -bias) == -bias).all()
    assert (run_in_owner(_kept, {"text_config": {"n_group": 8}}, -bias) == 3 - bias).all()


@pytest.mark.parametrize(("hidden", "width"), [(8, 6), (8, 4), (8, 8), (8, 16)])
def test_experts_of_qwen3_vl_moe_are_the_same_either_way_round(hidden: int, width: int) -> None:
    released = {
        "mlp.experts.gate_up_proj": np.zeros((2, hidden, 2 * width), np.float32),
        "mlp.experts.down_proj": np.zeros((2, width, hidden), np.float32),
    }
    saved = {name: array.swapaxes(-1, -2) for name, array in released.items()}
    for form in (released, saved):
        fitted = run_in_owner(_fitted_shapes, "qwen3_vl_moe", form)
        assert fitted == {name: array.shape for name, array in released.items()}


def test_ernie_without_the_bias_that_chooses_its_experts_is_refused(tmp_path: Path) -> None:
    folder = write("ernie4_5_moe", tmp_path / "model", moe_num_experts=4, moe_k=2)
    with pytest.raises(
        PackagingError, match="e_score_correction_bias\\) is missing.*before it was con"
    ):
        check_loads(recognise(folder))


def test_bitnet_that_is_not_packed_is_refused(tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bitnet"}))
    with pytest.raises(PackagingError, match="only computes packed weights of 1.58 bits"):
        check_loads(recognise(folder))


def test_a_module_of_mlx_lm_that_ends_the_process_is_refused(tmp_path: Path) -> None:
    from mlops.engine.building import _Build

    build = _Build(recognise(write("llama", tmp_path / "model")))
    with pytest.raises(PackagingError, match="needs a library that is not installed"):
        run_in_owner(build.find_classes, {"model_type": "olmo"})


def write(architecture: str, folder: Path, **settings: Any) -> Path:
    """A model as mlx-lm has it, with a tokenizer."""
    tiny_models.write_tokenizer(folder)
    run_in_owner(_write, architecture, folder, settings)
    return folder


def _write(architecture: str, folder: Path, settings: dict[str, Any]) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    size = {"vocab_size": tiny_models.vocabulary_size()}
    model = every_architecture.build(architecture, **size, **settings)
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        dict(tree_flatten(model.parameters())),
        metadata={"format": "mlx"},
    )
    config = {name: value for name, value in vars(model.args).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def _selects_by_group() -> dict[str, Any]:
    import mlx_lm.models as package

    found = {}
    for name in every_architecture.names():
        module = getattr(package, name)
        for attribute in ("group_expert_select", "_group_expert_select"):
            if attribute in vars(module):
                found[name] = vars(module)[attribute]
    return found


def _select(select: Any, logits: Any, bias: Any) -> Any:
    import mlx.core as mx

    arguments = {
        "gates": mx.array(logits),
        "e_score_correction_bias": mx.array(_kept({"n_group": NUM_GROUPS}, bias)),
        "top_k": NUM_CHOSEN,
        "n_group": NUM_GROUPS,
        "topk_group": NUM_KEPT,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "score_function": "sigmoid",
    }
    names = {
        "logits": "gates",
        "expert_bias": "e_score_correction_bias",
        "bias": "e_score_correction_bias",
        "renormalize": "norm_topk_prob",
    }
    wanted = inspect.signature(select).parameters
    return np.array(select(*(arguments[names.get(name, name)] for name in wanted))[0])


def _chosen(scores: Any) -> list[set[int]]:
    """As transformers does it: no expert of another group than the best has any score."""
    groups = scores.reshape(len(scores), NUM_GROUPS, -1)
    best_two = np.sort(groups, axis=-1)[..., -2:].sum(axis=-1)
    out = np.argsort(best_two, axis=-1)[:, : NUM_GROUPS - NUM_KEPT]
    for row, numbers in zip(groups, out, strict=True):
        row[numbers] = -np.inf
    flat = groups.reshape(len(scores), -1)
    return [set(row) for row in np.argsort(flat, axis=-1)[:, -NUM_CHOSEN:].tolist()]


def _kept(config: dict[str, Any], bias: Any) -> Any:
    import mlx.core as mx

    from mlops.engine.routing import keep_to_groups

    weights = {"model.layers.1.mlp.gate.e_score_correction_bias": mx.array(bias)}
    keep_to_groups(config, weights)
    return np.array(next(iter(weights.values())))


def _fitted_shapes(architecture: str, weights: dict[str, Any]) -> dict[str, Any]:
    import mlx.core as mx

    from mlops.engine.weight_forms import _FORMS

    arrays = {name: mx.array(array) for name, array in weights.items()}
    return {name: array.shape for name, array in _FORMS[architecture](None, arrays).items()}
