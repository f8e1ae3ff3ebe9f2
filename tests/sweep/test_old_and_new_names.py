"""Configurations as transformers reads them, and the architectures that it has.

Where `config.json` has old and new names of a setting, what wins is what wins in transformers.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from sweep_cases import DEFAULTS, LEFT_OUT, REFUSED

from mlops.checkpoints.architectures import is_supported
from mlops.checkpoints.rope import EVERY_LAYER, read_ropes
from torch_process import PYTHON

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
NEW = {"rope_theta": 5e5, "rope_type": "default"}
CONFIGS: dict[str, dict[str, Any]] = {
    "new": {"model_type": "llama", "rope_parameters": NEW},
    "old": {"model_type": "llama", "rope_theta": 3e5, "rope_scaling": LLAMA3},
    "both thetas": {"model_type": "llama", "rope_theta": 3e5, "rope_parameters": NEW},
    "theta outside": {"model_type": "llama", "rope_theta": 3e5, "rope_parameters": YARN},
    "both objects": {
        "model_type": "llama",
        "rope_theta": 3e5,
        "rope_scaling": LLAMA3,
        "rope_parameters": NEW,
    },
    "scaling without theta": {
        "model_type": "llama", "rope_scaling": LLAMA3, "rope_parameters": NEW
    },
    "old name of type": {"model_type": "qwen2", "rope_scaling": {"type": "linear", "factor": 2.0}},
    "length outside": {"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "partial outside": {"model_type": "phi", "partial_rotary_factor": 0.25, "rope_theta": 1e4},
    "partial inside": {
        "model_type": "phi",
        "partial_rotary_factor": 0.25,
        "rope_parameters": NEW | {"partial_rotary_factor": 0.75},
    },
    "partial by default": {"model_type": "stablelm", "rope_theta": 1e4},
    "gpt_neox old": {"model_type": "gpt_neox", "rotary_emb_base": 5e4, "rotary_pct": 0.5},
    "gpt_neox both": {"model_type": "gpt_neox", "rotary_emb_base": 5e4, "rope_parameters": NEW},
    "theta by default": {"model_type": "mixtral", "rope_parameters": {"rope_type": "default"}},
    "rotary_dim": {"model_type": "minimax_m2", "rotary_dim": 8, "head_dim": 16, "rope_theta": 1e4},
    "gemma3 old": {
        "model_type": "gemma3_text",
        "rope_theta": 2e6,
        "rope_local_base_freq": 2e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3 both": {
        "model_type": "gemma3_text",
        "rope_theta": 2e6,
        "rope_local_base_freq": 2e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_parameters": {"full_attention": NEW, "sliding_attention": NEW},
    },
    "olmo3 old": {"model_type": "olmo3", "rope_theta": 2e6, "rope_scaling": YARN},
    "phi3 old": {
        "model_type": "phi3",
        "rope_theta": 2e4,
        "original_max_position_embeddings": 128,
        "rope_scaling": {
            "type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8
        },
    },
}  # fmt: skip
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 256}


pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="transformers is not in .tools/reference: make reference"
)


@pytest.fixture(scope="module")
def transformers_says(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("configs") / "configs.json"
    file.write_text(json.dumps([SIZES | config for config in CONFIGS.values()]), encoding="utf-8")
    done = subprocess.run(
        [PYTHON, Path(__file__).with_name("config_reference.py"), file],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_wins_is_what_wins_in_transformers(
    transformers_says: dict[str, Any], name: str
) -> None:
    theirs = transformers_says["ropes"][list(CONFIGS).index(name)]
    ropes, _ = read_ropes(Path(name), SIZES | CONFIGS[name])
    if EVERY_LAYER in ropes and "full_attention" in theirs:
        ropes = dict.fromkeys(theirs, ropes[EVERY_LAYER])
    for layers, rope in ropes.items():
        expected = theirs[layers] if layers else theirs
        assert rope is not None
        ours = {setting: rope.as_parameters.get(setting) for setting in expected}
        assert ours | {"type": None} == expected | {"type": None}


def test_the_sweep_has_every_architecture_that_both_have(
    transformers_says: dict[str, Any],
) -> None:
    shared = {
        name for name in transformers_says["model_types"] if is_supported({"model_type": name})
    }
    assert {*DEFAULTS, *REFUSED, *LEFT_OUT} == shared
