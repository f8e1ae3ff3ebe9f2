"""Every spelling of a module's name finds the module; nothing is guessed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops.checkpoints import ModuleNames, check_adapter_fits, recognise, updates_in_base
from mlops.checkpoints.adapter_names import OUTER_PARTS, WRAPPERS, clean_name, layer_of, stem
from mlops.errors import PackagingError
from tiny_models import write_safetensors

LEAVES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.shared_expert.up_proj")
STEMS = (*(f"layers.{number}.{leaf}" for number in (0, 1, 11) for leaf in LEAVES), "embed_tokens")
BASES = {
    "llama": [*(f"model.{name}" for name in STEMS), "lm_head", "model.norm", "model"],
    "multimodal": [
        *(f"language_model.model.{name}" for name in STEMS),
        "language_model.lm_head",
        "vision_tower.encoder.layers.0.self_attn.q_proj",
        "multi_modal_projector",
    ],
    "multimodal of transformers 5": [
        *(f"model.language_model.{name}" for name in STEMS),
        "lm_head",
        "model.visual.blocks.0.attn.qkv",
    ],
    "headless": list(STEMS),
    "gpt2": [f"transformer.h.{number}.attn.c_attn" for number in (0, 1)] + ["transformer.wte"],
    "gpt2 of mlx-lm": [f"model.h.{number}.attn.c_attn" for number in (0, 1)] + ["model.wte"],
    "gpt_neox": [f"gpt_neox.layers.{number}.mlp.dense_4h_to_h" for number in (0, 1)],
    "gpt_neox of mlx-lm": [f"model.h.{number}.mlp.dense_4h_to_h" for number in (0, 1)],
    "mamba": [f"backbone.layers.{number}.mixer.in_proj" for number in (0, 1)],
}
PREFIXES = (
    "", "base_model.model.", "base_model.model.model.", "base_model.",
    "base_model.model.base_model.model.", "module.base_model.model.",
    "_orig_mod.base_model.model.", "_fsdp_wrapped_module.base_model.model.",
)  # fmt: skip
OUTER = (
    "", "model.", "language_model.", "language_model.model.", "model.language_model.",
    "text_model.model.", "transformer.", "llm.model.",
)  # fmt: skip


def spellings(name: str) -> list[str]:
    """What trainers and libraries call one module."""
    path = stem(name)
    plain = [f"{prefix}{outer}{path}" for prefix in PREFIXES for outer in OUTER]
    plain += [f"{prefix}{name}" for prefix in PREFIXES]
    return plain + [
        ".".join([*parts[:place], wrapper, *parts[place:]])
        for wrapper in sorted(WRAPPERS)
        for parts in [f"base_model.model.{name}".split(".")]
        for place in range(len(parts))
    ]


@pytest.mark.parametrize("base", BASES)
def test_every_spelling_of_every_module_finds_it(base: str) -> None:
    names = ModuleNames(BASES[base])
    for name in BASES[base]:
        if name == "model" or name.startswith(("vision_tower", "model.visual", "multi_modal")):
            continue
        for spelling in spellings(name):
            assert names.find(spelling) == name, spelling


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(BASES, 2)))
def test_a_name_of_one_library_finds_the_module_of_another(one: str, other: str) -> None:
    by_stem = {stem(name): name for name in BASES[other]}
    names = ModuleNames(BASES[other])
    for name in BASES[one]:
        assert names.find(name) == by_stem.get(stem(name)), name


@pytest.mark.parametrize("base", BASES)
@given(name=st.text("abchjmq_.0123", min_size=1, max_size=40))
def test_what_is_not_there_has_a_reason(base: str, name: str) -> None:
    names = ModuleNames(BASES[base])
    if names.find(name) is None:
        assert clean_name(name) in names.why_not(name) or "changes layer" in names.why_not(name)


def test_towers_are_not_the_language_model() -> None:
    names = ModuleNames(BASES["multimodal"])
    tower = "vision_tower.encoder.layers.0.self_attn.q_proj"
    assert names.find(f"base_model.model.model.{tower}") == tower
    assert names.find("vision_model.layers.0.self_attn.q_proj") is None
    assert ModuleNames(BASES["llama"]).find(tower) is None
    assert not OUTER_PARTS & {"vision_tower", "visual", "vision_model", "audio_tower", "encoder"}
    assert layer_of(tower) is None
    assert layer_of("base_model.model.model.layers.7.x") == 7


def test_two_modules_of_one_name_are_not_guessed_between() -> None:
    twins = ["model.layers.0.q_proj", "text_model.layers.0.q_proj"]
    names = ModuleNames(twins)
    assert names.find("language_model.layers.0.q_proj") is None
    assert names.why_not("language_model.layers.0.q_proj") == (
        "language_model.layers.0.q_proj may be any of the base's model.layers.0.q_proj, "
        "text_model.layers.0.q_proj"
    )
    for name in twins:
        assert names.find(f"base_model.model.{name}") == name


Q = "model.layers.0.self_attn.q_proj"
SHAPES = {"A": (4, 8), "B": (6, 4)}


def base_model(folder: Path) -> Path:
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", {f"{Q}.weight": (6, 8)})
    config = {"model_type": "phi", "hidden_size": 8, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def peft_adapter(folder: Path, tensors: dict[str, tuple[int, ...]], **config: Any) -> Path:
    folder.mkdir()
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "module.base_model.model._orig_mod."])
@pytest.mark.parametrize("middle", ["", ".default", ".my_adapter", ".0"])
def test_raw_and_saved_names_of_peft(tmp_path: Path, prefix: str, middle: str) -> None:
    names = {f"{prefix}{Q}.lora_{x}{middle}.weight": shape for x, shape in SHAPES.items()}
    magnitude = f"{prefix}{Q}.lora_magnitude_vector{middle}{'.weight' if middle else ''}"
    adapter = recognise(peft_adapter(tmp_path / "a", names | {magnitude: (6,)}, use_dora=True))
    assert adapter.adapter is not None
    (module,) = adapter.adapter.modules.values()
    assert (module.name, module.key_m) == (Q, magnitude)
    (update,) = updates_in_base(adapter, recognise(base_model(tmp_path / "b")))
    assert update.name == Q


def test_parameters_of_embeddings_have_the_adapters_name_and_no_weight(tmp_path: Path) -> None:
    for middle in ("", ".default", ".other"):
        names = {f"base_model.model.wte.lora_embedding_A{middle}": (4, 10)}
        names[f"base_model.model.wte.lora_embedding_B{middle}"] = (6, 4)
        adapter = recognise(peft_adapter(tmp_path / f"a{middle}", names)).adapter
        assert adapter is not None
        assert list(adapter.modules) == ["wte"]


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    names = {f"{Q}.lora_{x}.{name}.weight": SHAPES[x] for x in "AB" for name in ("one", "two")}
    with pytest.raises(PackagingError, match="holds 2 adapters, one, two; save each"):
        recognise(peft_adapter(tmp_path / "a", names))


@pytest.mark.parametrize(
    "alias", [f"base_model.model._orig_mod.{Q}", f"language_model.{Q}", f"base_model.model.{Q}"]
)
def test_two_names_for_one_module(tmp_path: Path, alias: str) -> None:
    """Accepted while their tensors are the same byte by byte, refused by both names else."""
    names = {f"{name}.lora_{x}.weight": SHAPES[x] for x in "AB" for name in (Q, alias)}
    base = recognise(base_model(tmp_path / "base"))
    folder = peft_adapter(tmp_path / "adapter", names)
    (update,) = updates_in_base(recognise(folder), base)
    assert update.parts[0].module.key_a in names

    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x02")  # the last tensor's last byte
    with pytest.raises(PackagingError, match="differ") as caught:
        check_adapter_fits(recognise(folder), base)
    assert all(f"{name}.lora_" in caught.value.message for name in (Q, alias))


def test_widths_are_compared_under_every_name(tmp_path: Path) -> None:
    names = {f"base_model.model.language_model.{Q}.lora_{x}.weight": SHAPES[x] for x in "AB"}
    names |= {f"base_model.model.language_model.{Q}.lora_A.weight": (4, 9)}
    adapter = recognise(peft_adapter(tmp_path / "a", names, base_model_name_or_path="org/other"))
    with pytest.raises(PackagingError, match="belongs to another base model") as caught:
        check_adapter_fits(adapter, recognise(base_model(tmp_path / "b")))
    assert "takes 9 and gives 6 values" in caught.value.message
    assert caught.value.message.endswith("trained on org/other, as its adapter_config.json says")
