"""Where in a model the tensors of an adapter go, for packaging and loading alike.

Mostly each pair belongs to one module of the same name. Not so with experts (`expert_adapters`),
and with an output layer that is the embedding: mlx-lm has no module of that name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlops.checkpoints.adapter_names import ModuleNames, stem
from mlops.checkpoints.checkpoint import AdapterModule, Checkpoint, Part, Update
from mlops.checkpoints.expert_adapters import (
    ExpertLinears,
    place_experts,
    stored_expert_linears,
)
from mlops.checkpoints.tensors import WeightShapes

_EMBEDDINGS = frozenset({"wte", "word_embeddings", "embed_in", "tok_embeddings", "embeddings"})


@dataclass(frozen=True)
class BaseModules:
    """What a base model has that adapters change.

    Attributes:
        names: of all modules.
        embeddings: rows and possible columns of the embeddings, by name.
        experts: linears of its blocks of experts.
    """

    names: ModuleNames
    embeddings: Mapping[str, tuple[int, tuple[int, ...]]]
    experts: ExpertLinears


def stored_modules(base: Checkpoint) -> BaseModules:
    """The modules of a checkpoint, told from its headers."""
    shapes = WeightShapes(base.tensors, base.config)
    names = {name.rpartition(".")[0] for name in base.tensors}
    embeddings = {
        name: (shapes.leading(name)[0], tuple(shapes.possible_columns(name)))
        for name in names
        if is_embedding(name) and len(shapes.leading(name)) == 1
    }
    return BaseModules(ModuleNames(names), embeddings, stored_expert_linears(base))


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
            rest.append(module)
        else:
            updates.append(Update(module.name, (Part(module),), embedding=embedding))
    return updates, rest


def _tied_embedding(module: AdapterModule, base: BaseModules) -> str | None:
    """The embedding that this output layer is, where the base has none of its own."""
    if stem(module.name) != "lm_head" or base.names.find(module.name) is not None:
        return None
    found = [
        name
        for name, (rows, columns) in base.embeddings.items()
        if rows == module.out_features and module.in_features in columns
    ]
    return found[0] if len(found) == 1 else None


def is_conv1d(base: Checkpoint, name: str | None) -> bool:
    """Whether a weight lies as (in, out): GPT-2's linears do, and mlx-lm turns them when loading.

    PEFT's A and B do not depend on it, whatever `fan_in_fan_out` says.
    """
    if name is None or base.architecture != "gpt2" or name.startswith("model."):
        return False
    return name.rpartition(".")[2] in ("c_attn", "c_proj", "c_fc")
