"""Where in a model the tensors of an adapter go, for packaging and loading alike.

Mostly each pair belongs to one module of the same name. Not so with experts (`expert_adapters`),
and with an output layer that is the embedding: mlx-lm has no module of that name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from mlops.checkpoints.checkpoint import AdapterModule, Checkpoint, Part, Update
from mlops.checkpoints.expert_adapters import (
    ExpertLinears,
    place_experts,
    stored_expert_linears,
)
from mlops.checkpoints.tensors import WeightShapes

_OUTPUT_LAYERS = frozenset({"lm_head", "embed_out"})
_EMBEDDINGS = frozenset({"wte", "word_embeddings", "embed_in", "tok_embeddings", "embeddings"})


@dataclass(frozen=True)
class BaseModules:
    """What a base model has that adapters change.

    Attributes:
        names: of all modules with weights.
        embeddings: rows and possible columns of the embeddings, by name.
        experts: linears of its blocks of experts.
    """

    names: frozenset[str]
    embeddings: Mapping[str, tuple[int, tuple[int, ...]]]
    experts: ExpertLinears

    @cached_property
    def by_tail(self) -> dict[str, str]:
        """Names by what they have from their layer on, where that is one module's alone."""
        found: dict[str, list[str]] = {}
        for name in self.names:
            found.setdefault(from_layers(name), []).append(name)
        return {tail: names[0] for tail, names in found.items() if len(names) == 1}


def stored_modules(base: Checkpoint) -> BaseModules:
    """The modules of a checkpoint, told from its headers."""
    shapes = WeightShapes(base.tensors, base.config)
    names = frozenset(
        name.removesuffix(".weight") for name in base.tensors if name.endswith(".weight")
    )
    embeddings = {
        name: (shapes.leading(name)[0], tuple(shapes.possible_columns(name)))
        for name in names
        if is_embedding(name) and len(shapes.leading(name)) == 1
    }
    return BaseModules(names, embeddings, stored_expert_linears(base))


def is_embedding(name: str) -> bool:
    """Whether a module of this name is an embedding of tokens."""
    leaf = name.rpartition(".")[2]
    return "embed_tokens" in leaf or leaf in _EMBEDDINGS


def place(
    adapter: Checkpoint, base: Checkpoint, modules: BaseModules, operation: str
) -> tuple[list[Update], list[AdapterModule]]:
    """What an adapter does to modules that are none of its own names, and its other modules.

    Args:
        modules: of the base.
        operation: what is being done; for errors.

    Raises:
        PackagingError: the experts of the base cannot take what the adapter has for them.
    """
    updates, others = place_experts(adapter, modules.experts, base, operation)
    rest = []
    for module in others:
        embedding = _tied_embedding(module, modules)
        if embedding is None:
            rest.append(_renamed(module, modules))
        else:
            updates.append(Update(module.name, (Part(module),), embedding=embedding))
    return updates, rest


def _tied_embedding(module: AdapterModule, base: BaseModules) -> str | None:
    """The embedding that this output layer is, where the base has none of its own."""
    leaf = module.name.rpartition(".")[2]
    has_own = any(name == leaf or name.endswith(f".{leaf}") for name in base.names)
    if leaf not in _OUTPUT_LAYERS or has_own:
        return None
    found = [
        name
        for name, (rows, columns) in base.embeddings.items()
        if rows == module.out_features and module.in_features in columns
    ]
    return found[0] if len(found) == 1 else None


def _renamed(module: AdapterModule, base: BaseModules) -> AdapterModule:
    """The module by the name that the base has for it. Loaders add and drop what stands before the
    layers, and Transformers 5 calls `mlp` what mlx-lm keeps calling `block_sparse_moe`."""
    if module.name in base.names:
        return module
    tail = from_layers(module.name)
    for one, other in (("", ""), (".mlp.", ".block_sparse_moe."), (".block_sparse_moe.", ".mlp.")):
        if name := base.by_tail.get(tail.replace(one, other) if one else tail):
            return replace(module, name=name)
    return module


def from_layers(name: str) -> str:
    """A module's name from the number of its layer on; without `model.` where there is none."""
    match = re.search(r"\b(?:layers|h|blocks)\.\d+\..*$", name)
    return match[0] if match else name.removeprefix("model.")


def is_conv1d(base: Checkpoint, name: str) -> bool:
    """Whether a weight lies as (in, out): GPT-2's linears do, and mlx-lm turns them when loading.

    PEFT's A and B do not depend on it, whatever `fan_in_fan_out` says.
    """
    leaf = name.rpartition(".")[2]
    is_turned = base.architecture == "gpt2" and not name.startswith("model.")
    return is_turned and leaf in ("c_attn", "c_proj", "c_fc")
