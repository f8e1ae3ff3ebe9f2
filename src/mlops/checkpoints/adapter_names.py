"""One way of naming a module, for packaging and for loading alike.

Trainers, Transformers and mlx-lm call the same module by different names: the layers of a language
model are `model.layers`, `language_model.model.layers`, `model.language_model.layers` or
`transformer.h`; PEFT, DDP, FSDP and `torch.compile` put parts of their own before and between.
What is left without all that is the module's stem, `layers.0.self_attn.q_proj`, and two names with
the same stem are the same module. Where two modules of a base have one stem, nothing is guessed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Set

from mlops.checkpoints.refusal import examples
from mlops.counts import count

WRAPPERS = frozenset(
    {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)
"""What `torch.compile`, DDP, FSDP, activation checkpointing and DeepSpeed put into names."""

OUTER_PARTS = frozenset({
    "backbone", "base_model", "gpt_neox", "language_model", "llm", "model", "text_model",
    "transformer",
})  # fmt: skip
"""What holds a language model, in any order and number; towers for images and sound do not."""

_FIRST = {"h": "layers", "blocks": "layers", "embed_out": "lm_head", "output": "lm_head"}
_ANYWHERE = {"block_sparse_moe": "mlp", "shared_expert": "shared_experts"}
"""What mlx-lm or a version of Transformers renames: as the first part of a stem, and anywhere."""

_SAME_BLOCK = ((".block_sparse_moe.", ".mlp."), (".mlp.", ".block_sparse_moe."))
"""What Transformers 5 and mlx-lm call the block of a layer's experts and their router."""

_TOGETHER = {
    **dict.fromkeys(("qkv_proj", "query_key_value", "c_attn", "Wqkv", "W_pack", "in_proj_qkv"),
                    ("q_proj", "k_proj", "v_proj")),
    **dict.fromkeys(("gate_up_proj", "gate_and_up_proj"), ("gate_proj", "up_proj")),
    "kv_b_proj": ("embed_q", "unembed_out"),
}  # fmt: skip
"""Matrices that hold several, by what these are called where each is on its own."""


def clean_name(name: str) -> str:
    """A module's name in the model that was trained: without wrappers and PEFT's prefix."""
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS) or name
    while name.startswith(("base_model.model.", "base_model.")):
        name = name.removeprefix("base_model.").removeprefix("model.")
    return name


def stem(name: str) -> str:
    """What all names of a module have in common."""
    parts = clean_name(name).split(".")
    while len(parts) > 1 and parts[0] in OUTER_PARTS:
        del parts[0]
    parts[0] = _FIRST.get(parts[0], parts[0])
    return ".".join(_ANYWHERE.get(part, part) for part in parts)


class ModuleNames:
    """The modules of a base model, to be found by any of their names.

    Args:
        names: of modules; of mlx-lm's model where it is there, else those in the weight files.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        self._parts: dict[str, set[str]] = defaultdict(set)  # of each module, by its stem
        for name in sorted(self._names):
            path = stem(name)
            self._by_stem[path].append(name)
            while path:
                path, _, part = path.rpartition(".")
                self._parts[path].add(part)
        numbers = (int(part) for part in self.parts("layers") if re.fullmatch("[0-9]{1,9}", part))
        self.num_layers = 1 + max(numbers, default=-1)

    def parts(self, path: str) -> Set[str]:
        """What lies directly in a module, by its stem: `self_attn` and `mlp` in `layers.0`."""
        return self._parts.get(path, set())

    def find(self, name: str) -> str | None:
        """The base's name of a module; None: `why_not` says why."""
        name = clean_name(name)
        if name in self._names:
            return name
        path = stem(name)
        for part, other in _SAME_BLOCK:
            if path not in self._by_stem:
                path = path.replace(part, other)
        found = self._by_stem.get(path, [])
        return found[0] if len(found) == 1 else None

    def why_not(self, name: str) -> str:
        """Why `find` finds nothing, to follow a colon."""
        name, path = clean_name(name), stem(name)
        if path in self._by_stem:
            return f"{name} may be any of the base's {examples(self._by_stem[path])}"
        if (layer := layer_of(name)) is not None and 0 < self.num_layers <= layer:
            layers = count(self.num_layers, "layer")
            return f"it changes layer {layer} (counted from 0), and the base has {layers}"
        if path == "lm_head":
            return "the base has no lm_head: its output layer is its embedding"
        parent, _, leaf = path.rpartition(".")
        while parent and parent not in self._parts:
            parent, _, leaf = parent.rpartition(".")
        there = self.parts(parent)
        where = f"in the base's {parent} there is" if parent else "the base has"
        return (
            _fused(leaf, there, parent)
            or f"the base has no {name}; {where} {examples(sorted(there), 8) or 'nothing'}"
        )


def layer_of(name: str) -> int | None:
    """The number of the language model's layer that a module is in."""
    match = re.match(r"layers\.([0-9]{1,9})\.", stem(name))
    return int(match[1]) if match else None


def _fused(leaf: str, there: Set[str], parent: str) -> str:
    """That the base has together what the adapter has apart, or the reverse; or ""."""
    for whole, parts in _TOGETHER.items():
        if leaf in parts and whole in there:
            return (
                f"it changes {leaf} of {parent} on its own, and the base has {whole}, "
                f"{examples(list(parts))} in one: merge the adapter into the model that it was "
                "trained on"
            )
        if leaf == whole and set(parts) <= there:
            return (
                f"it changes {whole} of {parent}, {examples(list(parts))} in one, and the base has "
                "each on its own: merge the adapter into the model that it was trained on"
            )
    return ""
