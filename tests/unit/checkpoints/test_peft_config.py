"""Every setting of PEFT is honoured, refused by name, or known to change nothing."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from mlops.checkpoints.peft_config import HONOURED, REFUSED_WHEN_SET, WITHOUT_EFFECT, PeftConfig
from mlops.errors import PackagingError

ROOT = Path(__file__).parents[3]
KNOWN = HONOURED | REFUSED_WHEN_SET | WITHOUT_EFFECT
PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def peft_sources() -> Path | None:
    return next(ROOT.glob(".tools/reference/lib/python*/site-packages/peft"), None)


@pytest.mark.skipif(peft_sources() is None, reason="no PEFT in .tools/reference: make reference")
def test_the_tables_name_every_field_of_the_installed_peft() -> None:
    """Read from its source: a version with a new setting fails here."""
    folder = peft_sources()
    assert folder is not None
    fields = set()
    for file, name in (
        ("config.py", "PeftConfigMixin"),
        ("config.py", "PeftConfig"),
        ("tuners/lora/config.py", "LoraConfig"),
    ):
        tree = ast.parse((folder / file).read_text(encoding="utf-8"))
        (found,) = (
            node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name
        )
        fields |= {
            node.target.id
            for node in found.body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
    assert {"r", "lora_alpha", "target_modules", "inference_mode", "auto_mapping"} <= fields
    assert fields - KNOWN == set()


def test_no_setting_is_in_two_tables() -> None:
    assert len(KNOWN) == len(HONOURED) + len(REFUSED_WHEN_SET) + len(WITHOUT_EFFECT)


@pytest.mark.parametrize("setting", sorted(REFUSED_WHEN_SET))
def test_a_setting_that_is_not_supported_is_refused_when_it_is_set(setting: str) -> None:
    for value in (None, False, {}, []):
        assert PeftConfig(Path("a"), {**PLAIN, setting: value}).scale("q", 4) == 2
    with pytest.raises(PackagingError, match=setting) as caught:
        PeftConfig(Path("a"), {**PLAIN, setting: {"x": 1}})
    assert caught.value.details["setting"] == setting


@pytest.mark.parametrize("setting", sorted(WITHOUT_EFFECT))
def test_a_setting_without_effect_changes_nothing(setting: str) -> None:
    config = PeftConfig(Path("a"), {**PLAIN, setting: ["anything"]})
    assert (config.scale("q", 4), config.warnings) == (2, ())


def test_what_nobody_knows_is_told_of_or_refused() -> None:
    config = PeftConfig(Path("a"), {**PLAIN, "novelty": 3, "other": None, "third": [1]})
    assert config.warnings == (
        "adapter_config.json of a has settings that are not known here, and were not looked at: "
        "novelty, third",
    )
    for name in ("use_novelty", "novelty_config"):
        with pytest.raises(PackagingError, match=name):
            PeftConfig(Path("a"), {**PLAIN, name: {"x": 1}})
        assert PeftConfig(Path("a"), {**PLAIN, name: None}).warnings == ()


def test_modules_that_came_along_are_named() -> None:
    with pytest.raises(PackagingError, match=re.escape("(modules_to_save): lm_head, embed_tokens")):
        PeftConfig(Path("a"), {**PLAIN, "modules_to_save": ["lm_head", "embed_tokens"]})


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2),
        ({"use_rslora": True}, 4),
        ({"alpha_pattern": {r"layers\.\d+\.q": 16}}, 4),
        ({"alpha_pattern": {r"layers\.\d+\.k": 16}}, 2),
        ({"alpha_pattern": {"q": 16}, "use_rslora": True}, 8),
        ({"rank_pattern": {".*q": 4}, "r": 64, "alpha_pattern": {"^layers.0.*": 2}}, 0.5),
        ({"alpha_pattern": {"q": 0}}, 0),
    ],
)
def test_scales(config: dict[str, Any], scale: float) -> None:
    assert PeftConfig(Path("a"), PLAIN | config).scale("layers.0.q", 4) == scale
