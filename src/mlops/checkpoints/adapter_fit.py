"""Does an adapter fit a base model, and if not, what is wrong?

Asked when packaging, of the names and shapes in the weight files, and when loading, of the modules
of the model in memory: by one rule (`adapter_names`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from mlops.checkpoints.adapter_names import ModuleNames, layer_of, stem
from mlops.checkpoints.checkpoint import (
    AdapterInfo,
    AdapterModule,
    Checkpoint,
    CheckpointKind,
    Part,
    Update,
)
from mlops.checkpoints.placement import BaseModules, is_conv1d, place, stored_modules
from mlops.checkpoints.refusal import refusal
from mlops.checkpoints.tensor_values import have_same_bytes, is_copy
from mlops.checkpoints.tensors import WeightShapes
from mlops.counts import count

OPERATION = "check_adapter_fits"


def check_adapter_fits(adapter: Checkpoint, base: Checkpoint) -> None:
    """Raise `PackagingError` when the adapter does not fit the base, going by its weight files."""
    updates_in_base(adapter, base)


def check_copies(adapter: Checkpoint, base: Checkpoint) -> None:
    """Raise `PackagingError` unless what an adapter has of its base is as it is there.

    Reads both: a second for the embedding of a large model.
    """
    info = _check_kinds(adapter, base)
    stored = stored_modules(base)
    for module, key in info.copies.items():
        name = stored.names.find(module)
        if name is None and stem(module) == "lm_head":  # the embedding, of which there is one
            name = next(iter(stored.embeddings), None)
        original = base.tensors.get(f"{name}.weight")
        file = adapter.path / adapter.weight_files[0]
        if original is None or not is_copy(
            file, adapter.tensors[key], base.path / original.file, original
        ):
            raise refusal(
                f"the adapter {adapter.path} has a layer of its base, {key}, which is not as it is "
                f"in {base.path}: it was trained or resized too, or the base is stored in another "
                "type; save the adapter with save_embedding_layers=False if it was not changed, "
                "else merge it into its model",
                adapter.path,
                OPERATION,
                base=str(base.path),
                tensors=[key],
            )


def updates_in_base(
    adapter: Checkpoint, base: Checkpoint, modules: BaseModules | None = None
) -> list[Update]:
    """What an adapter does to each module of the base model, by the base's names.

    Args:
        modules: of mlx-lm's model. Without them the weight files are asked, and what the loader
            stacks is left to it.

    Raises:
        PackagingError: the base has no such module, or one of another shape; or two modules of the
            adapter are the same one of the base, and differ.
    """
    info = _check_kinds(adapter, base)
    stored = stored_modules(base)
    updates, others = place(adapter, base, modules or stored, OPERATION)
    names = (modules or stored).names
    shapes = WeightShapes(base.tensors, base.config)
    found: dict[str, AdapterModule] = {}
    missing: dict[str, str] = {}
    misfits: dict[str, str] = {}
    for module in others:
        name, in_files = names.find(module.name), stored.names.find(module.name)
        if name is None:
            if modules is not None or not _is_stacked_later(module.name, stored.names):
                missing[module.key_a] = names.why_not(module.name)
        elif problem := _misfit(module, in_files, shapes, is_conv1d(base, in_files)):
            misfits[module.key_a] = problem
        elif name not in found:
            found[name] = replace(module, name=name)
        elif not _agree(adapter, module, found[name]):
            raise _contradiction(adapter, module, found[name])
    if misfits:
        raise _refusal(adapter, base, f"belongs to another base model than {base.path}", misfits)
    if missing:
        layers = _layer_problem(info, names)
        raise _refusal(adapter, base, f"does not fit {base.path}", missing, layers)
    return updates + [
        Update(name, (Part(module),), module.num_experts) for name, module in found.items()
    ]


def _check_kinds(adapter: Checkpoint, base: Checkpoint) -> AdapterInfo:
    if adapter.adapter is None:
        raise refusal(f"{adapter.path} is not an adapter", adapter.path, OPERATION)
    if base.kind is not CheckpointKind.LANGUAGE_MODEL:
        raise refusal(
            f"the base of the adapter {adapter.path} is {base.description}, not a language model",
            adapter.path,
            OPERATION,
            base=str(base.path),
        )
    return adapter.adapter


def _is_stacked_later(name: str, stored: ModuleNames) -> bool:
    """True for experts of mlx-lm's model that lie one by one in the weight files."""
    block, found, _ = stem(name).partition(".switch_mlp.")
    return bool(found) and "experts" in stored.parts(block)


def _misfit(
    module: AdapterModule, stored: str | None, shapes: WeightShapes, is_turned: bool
) -> str:
    """Why the update does not fit the weight, or "" when it does or cannot be known."""
    columns = shapes.possible_columns(stored) if stored is not None else []
    rows = shapes.leading(stored) if stored is not None else ()
    if stored is None or not columns or not rows:
        return ""
    wanted = (module.in_features, module.out_features)
    leaf = stored.rpartition(".")[2]
    is_embedding = "emb" in leaf or leaf == "wte"
    row, column = wanted if is_embedding or is_turned else (wanted[1], wanted[0])
    experts = (module.num_experts,) if module.num_experts is not None else ()
    if rows == (*experts, row) and column in columns:
        return ""
    return (
        f"{module.key_a}: it takes {wanted[0]} and gives {wanted[1]} values, but the base's weight "
        f"is {[*rows, columns[0]]}"
    )


def _layer_problem(info: AdapterInfo, names: ModuleNames) -> str:
    """That the adapter has more layers than the base, or ""."""
    last = max((layer_of(name) or 0 for name in info.modules), default=0)
    if not 0 < names.num_layers <= last:
        return ""
    layers = count(names.num_layers, "layer")
    return f"it changes layers up to {last} (counted from 0), and the base has {layers}"


def _agree(adapter: Checkpoint, one: AdapterModule, other: AdapterModule) -> bool:
    """True when two modules of an adapter say the same."""
    pairs = [(one.key_a, other.key_a), (one.key_b, other.key_b)]
    if one.key_m is not None and other.key_m is not None:
        pairs.append((one.key_m, other.key_m))
    return one.scale == other.scale and all(
        have_same_bytes(one.file, adapter.tensors[mine], adapter.tensors[theirs])
        for mine, theirs in pairs
    )


def _contradiction(adapter: Checkpoint, one: AdapterModule, other: AdapterModule) -> Exception:
    return refusal(
        f"the adapter {adapter.path} has {other.name} of the base twice, as {other.key_a} and as "
        f"{one.key_a}, and they differ; save it again with the one that was trained",
        adapter.path,
        OPERATION,
        tensors=[other.key_a, one.key_a],
    )


def _refusal(
    adapter: Checkpoint,
    base: Checkpoint,
    verdict: str,
    problems: Mapping[str, str],
    summary: str = "",
) -> Exception:
    """One sentence for all problems: an example of each kind, however many modules have it."""
    kinds: dict[str, list[str]] = {}
    for problem in problems.values():
        kinds.setdefault(re.sub(r"\d+", "#", problem), []).append(problem)
    told = [
        found[0] + (f" (and {len(found) - 1} more like it)" if len(found) > 1 else "")
        for found in list(kinds.values())[:3]
    ]
    if len(kinds) > len(told):
        told.append(f"and {len(kinds) - len(told)} more")
    named = adapter.adapter.base_model if adapter.adapter is not None else None
    return refusal(
        f"the adapter {adapter.path} {verdict}: {summary or '; '.join(told)}"
        + (f". It was trained on {named}, as its adapter_config.json says" if named else ""),
        adapter.path,
        OPERATION,
        base=str(base.path),
        tensors=list(problems)[:3],
    )
