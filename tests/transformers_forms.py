"""Tiny models and adapters as Transformers and PEFT write them, where mlx-lm's form differs.

Experts: `experts.3.w1.weight` or `experts.3.gate_proj.weight`, one matrix each; gpt-oss has gate
and up in one, in turn, and (in, out). GPT-2's linears are `Conv1D`, (in, out).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

_STACKED = re.compile(r"(?P<block>.+)\.switch_mlp\.(?P<leaf>\w+)\.weight")
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def write_transformers_form(folder: Path, base: Path) -> Path:
    """A model of `tiny_models` with its tensors as Transformers names and lays them out."""
    shutil.copytree(base, folder)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    architecture = json.loads((base / "config.json").read_text())["model_type"]
    tensors: dict[str, Any] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if architecture == "gpt2":
            tensors |= _gpt2(name, tensor)
        elif architecture != "gpt_oss" or ".experts." not in name:
            tensors |= _experts(name, tensor, _MIXTRAL if architecture == "mixtral" else {})
    if architecture == "gpt_oss":
        tensors |= _gpt_oss(load_file(base / "model.safetensors"))
    save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def _gpt2(name: str, tensor: Any) -> dict[str, Any]:
    is_conv1d = re.search(r"\.(?:c_attn|c_proj|c_fc)\.weight$", name)
    return {name.removeprefix("model."): tensor.T if is_conv1d else tensor}


def _experts(name: str, tensor: Any, leaves: Mapping[str, str]) -> dict[str, Any]:
    if not (match := _STACKED.fullmatch(name)):
        return {name: tensor}
    leaf = leaves.get(match["leaf"], match["leaf"])
    return {
        f"{match['block']}.experts.{number}.{leaf}.weight": expert
        for number, expert in enumerate(tensor)
    }


def _gpt_oss(tensors: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, up in tensors.items():
        block, _, rest = name.partition(".experts.")
        if rest in ("up_proj.weight", "up_proj.bias"):
            gate = tensors[name.replace("up_proj", "gate_proj")]
            both = np.stack([gate, up], axis=2).reshape(len(up), -1, *up.shape[2:])
            key = f"{block}.experts.gate_up_proj"
            found[key if both.ndim == 3 else f"{key}_bias"] = both.swapaxes(1, -1)
        elif rest == "down_proj.weight":
            found[f"{block}.experts.down_proj"] = up.swapaxes(1, 2)
        elif rest == "down_proj.bias":
            found[f"{block}.experts.down_proj_bias"] = up
    return found


def write_expert_adapter(
    folder: Path,
    base: Path,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    absent: Collection[int] = (),
    ranks: Mapping[int, int] | None = None,
    is_padded: bool = False,
    seed: int = 3,
) -> Path:
    """Write a PEFT adapter with an A and B for each expert, as Transformers 4 has modules for them.

    Args:
        base: a model that `write_transformers_form` wrote.
        absent: experts that have none.
        ranks: of experts that have fewer than `rank`.
        is_padded: write the same update with all experts, all of `rank`.
    """
    source = np.random.default_rng(seed)
    tensors, rank_pattern = {}, {}
    for name, weight in sorted(load_file(base / "model.safetensors").items()):
        match = re.fullmatch(r"(.+\.experts\.(\d+)\.\w+)\.weight", name)
        if not match:
            continue
        expert = int(match[2])
        own = (ranks or {}).get(expert, rank)
        a = source.normal(size=(own, weight.shape[1])).astype(np.float32)
        b = 0.1 * source.normal(size=(weight.shape[0], own)).astype(np.float32)
        if is_padded:
            b *= (rank / own) * (expert not in absent)
            a = np.pad(a, [(0, rank - own), (0, 0)])
            b = np.pad(b, [(0, 0), (0, rank - own)])
        elif expert in absent:
            continue
        elif own != rank:
            rank_pattern[match[1]] = own
        tensors[f"base_model.model.{match[1]}.lora_A.weight"] = a
        tensors[f"base_model.model.{match[1]}.lora_B.weight"] = b
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    leaves = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": leaves,
        "rank_pattern": rank_pattern,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
