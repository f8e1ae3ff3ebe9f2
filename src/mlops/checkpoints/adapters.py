"""LoRA and DoRA adapters, in mlx-lm's format and in Hugging Face PEFT's.

An adapter that loads and then does nothing, or something else than it was trained to do, is worse
than one that is refused. So every tensor must belong to a module, A and B must pair up, and every
kind of adapter that would need more than `base(x) + scale * (x @ A @ B)` is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlops.checkpoints.adapter_names import clean_name
from mlops.checkpoints.checkpoint import (
    AdapterInfo,
    AdapterModule,
    Checkpoint,
    CheckpointKind,
    TensorInfo,
    size_of_model,
)
from mlops.checkpoints.expert_adapters import read_parameters
from mlops.checkpoints.files import CheckpointFile, read_json
from mlops.checkpoints.peft_config import CONFIG, PeftConfig, read_number
from mlops.checkpoints.refusal import examples, refusal
from mlops.checkpoints.tensor_values import have_same_bytes
from mlops.checkpoints.tensors import read_tensors

MLX_LM_WEIGHTS = "adapters.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"

FLOATS = ("F32", "F16", "BF16")

LARGEST_SCALE = 1e4
"""Of an adapter, alpha over rank: trained ones have 0.1 to some 100."""

_COPY = ".base_layer.weight"

_MLX_KEY = re.compile(r"^(?P<module>.+)\.(?P<part>lora_a|lora_b|m)$")
_PEFT_KEY = re.compile(
    # A layer of PyTorch has a `weight`; a parameter is called by the adapter's name alone.
    r"^(?P<module>.+)\.(?:(?P<part>lora_A|lora_B)(?:\.(?P<adapter>[^.]+))?\.weight"
    r"|(?P<parameter>lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$)(?P<owner>[^.]+))?(?:\.weight)?)$"
)
_PARTS = {
    "lora_a": "a", "lora_b": "b", "m": "m",
    "lora_A": "a", "lora_B": "b", "lora_embedding_A": "a", "lora_embedding_B": "b",
    "lora_magnitude_vector": "m",
}  # fmt: skip


def recognise_adapter(path: Path, files: Mapping[str, CheckpointFile]) -> Checkpoint:
    """Recognise a folder that holds an adapter.

    Args:
        files: of the folder, by relative path.

    Raises:
        PackagingError: it is incomplete, contradicts itself or is of a kind that is not supported.
    """
    weights = [name for name in (MLX_LM_WEIGHTS, PEFT_WEIGHTS) if name in files]
    if len(weights) > 1:
        raise refusal(
            f"{path} holds two adapters, {weights[0]} and {weights[1]}; give each its own folder",
            path,
            files=weights,
        )
    if not weights:
        raise refusal(
            f"{path} has {CONFIG}, but neither {MLX_LM_WEIGHTS} nor {PEFT_WEIGHTS}; copy the "
            "checkpoint that you want to one of these names",
            path,
        )
    if CONFIG not in files:
        raise refusal(
            f"{path} has {weights[0]} but no {CONFIG}, which holds the scale; copy it from the "
            "training's output",
            path,
        )
    config = read_json(files[CONFIG])
    tensors, _ = read_tensors(path, [files[weights[0]]])
    read_format = _read_mlx_lm if weights[0] == MLX_LM_WEIGHTS else _read_peft
    info, warnings = read_format(path, config, tensors, files[weights[0]].path)
    _check_scales(path, info)
    num_parameters = sum(tensor.size for tensor in tensors.values())
    base = f" for {info.base_model}" if info.base_model else ""
    return Checkpoint(
        path=path,
        kind=CheckpointKind.ADAPTER,
        format=f"{info.format} adapter",
        framework="mlx" if info.format == "mlx-lm" else "transformers",
        description=f"{info.description}{base}, {size_of_model(num_parameters)} parameters",
        weight_files=(weights[0],),
        weight_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        num_parameters=num_parameters,
        dtypes=tuple(sorted({tensor.dtype for tensor in tensors.values()})),
        tensors=tensors,
        config=config,
        adapter=info,
        warnings=warnings,
    )


def _check_scales(path: Path, info: AdapterInfo) -> None:
    for module in info.modules.values():
        if not abs(module.scale) <= LARGEST_SCALE:
            raise refusal(
                f"the adapter {path} has the scale {module.scale:g} for {module.name}: nothing is "
                f"trained with more than {LARGEST_SCALE:g}, so the scale or alpha in {CONFIG} is "
                "wrong; write the one that it was trained with",
                path,
                file=CONFIG,
            )


@dataclass(frozen=True)
class _Tensors:
    """An adapter's tensors and how its format names and lays them out."""

    path: Path
    file: Path
    tensors: Mapping[str, TensorInfo]
    split_key: Callable[[str], _Key | None]
    is_dora: bool
    transposed: bool


@dataclass(frozen=True)
class _Key:
    """What the name of a tensor says.

    Attributes:
        part: `a`, `b`, or `m` for DoRA's magnitude.
        adapter: PEFT's name of the adapter, where it was left in.
    """

    module: str
    part: str
    adapter: str | None = None


def _split_mlx_lm(name: str) -> _Key | None:
    match = _MLX_KEY.match(name)
    return match and _Key(clean_name(match["module"]), _PARTS[match["part"]])


def _split_peft(name: str) -> _Key | None:
    match = _PEFT_KEY.match(name)
    return match and _Key(
        clean_name(match["module"]),
        _PARTS[match["part"] or match["parameter"]],
        match["adapter"] or match["owner"],
    )


def _read_mlx_lm(
    path: Path, config: dict[str, Any], tensors: Mapping[str, TensorInfo], file: Path
) -> tuple[AdapterInfo, tuple[str, ...]]:
    kind = config.get("fine_tune_type", "lora")
    if kind == "full":
        raise refusal(
            f"{path} is a full fine-tune, not an adapter: fuse it into its model "
            "(mlx_lm.fuse) and package the result",
            path,
            fine_tune_type="full",
        )
    if kind not in ("lora", "dora"):
        raise refusal(f"fine_tune_type {str(kind)[:80]!r} in {CONFIG} is not lora or dora", path)
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    number = read_number(scale)
    if number is None:
        raise refusal(
            f"lora_parameters.scale in {CONFIG} is {str(scale)[:80]!r}, not a number: write the "
            "scale that the adapter was trained with",
            path,
            file=CONFIG,
        )
    modules = _pair(_Tensors(path, file, tensors, _split_mlx_lm, kind == "dora", transposed=False))
    scaled = {name: replace(module, scale=number) for name, module in modules.items()}
    return AdapterInfo("mlx-lm", kind, _text(config.get("model")), scaled), ()


def _read_peft(
    path: Path, config: dict[str, Any], tensors: Mapping[str, TensorInfo], file: Path
) -> tuple[AdapterInfo, tuple[str, ...]]:
    settings = PeftConfig(path, config)
    copies = {
        clean_name(name.removesuffix(_COPY)): name for name in tensors if name.endswith(_COPY)
    }
    tensors = {name: tensor for name, tensor in tensors.items() if name not in copies.values()}
    modules = read_parameters(
        path,
        config.get("target_parameters") or [],
        _pair(_Tensors(path, file, tensors, _split_peft, settings.is_dora, transposed=True)),
        settings.rank,
        settings.scale,
    )
    base = _text(config.get("base_model_name_or_path"))
    kind = "dora" if settings.is_dora else "lora"
    return AdapterInfo("peft", kind, base, modules, copies), settings.warnings


def _pair(source: _Tensors) -> dict[str, AdapterModule]:
    """Every tensor to its module, or `PackagingError`; scales are still to be set."""
    found: dict[str, dict[str, str]] = {}
    adapters: dict[str, str] = {}
    strangers = []
    for name in sorted(source.tensors):
        key = source.split_key(name)
        if key is None or (key.part == "m" and not source.is_dora):
            strangers.append(name)
            continue
        if key.adapter is not None:
            adapters[key.adapter] = name
        first = found.setdefault(key.module, {}).setdefault(key.part, name)
        if first != name and not have_same_bytes(
            source.file, source.tensors[first], source.tensors[name]
        ):
            raise refusal(
                f"the adapter {source.path} has two tensors for one place, and they differ: "
                f"{first} and {name}; save it again with the one that was trained",
                source.path,
                tensors=[first, name],
            )
    if strangers:
        raise _no_part(source, strangers)
    if len(adapters) > 1:
        raise refusal(
            f"{source.file.name} in {source.path} holds {len(adapters)} adapters, "
            f"{examples(sorted(adapters))}; save each into its own folder",
            source.path,
            tensors=sorted(adapters.values())[:3],
        )
    if not found:
        raise refusal(f"the adapter {source.path} holds no tensors", source.path)
    return {name: _module(source, name, keys) for name, keys in sorted(found.items())}


def _no_part(source: _Tensors, strangers: list[str]) -> Exception:
    """The refusal of tensors that are neither A nor B, with what they are where that is known."""
    first = strangers[0]
    other, file = (
        (_split_peft, PEFT_WEIGHTS) if source.file.name == MLX_LM_WEIGHTS
        else (_split_mlx_lm, MLX_LM_WEIGHTS)
    )  # fmt: skip
    hint = ""
    if other(first) is not None and len(strangers) == len(source.tensors):
        hint = f"; they have the names of the format whose file is called {file}"
    elif (key := source.split_key(first)) is not None and key.part == "m":
        hint = f"; they are DoRA's, and {CONFIG} does not say that the adapter is one"
    elif ".base_layer." in first:
        hint = (
            "; they are copies of the base's own layers: save the adapter with "
            "save_embedding_layers=False, or merge it into its model"
        )
    elif first.endswith(".bias"):
        hint = "; biases are not supported: merge the adapter into its model"
    elif first.endswith((".A", ".B")):
        hint = "; early versions of mlx-vlm wrote these: fuse the adapter into its model with it"
    elif first.endswith(".weight"):
        hint = (
            "; they are whole weights: merge the adapter into its model, or package the folder as "
            "a model if that is what it is"
        )
    return refusal(
        f"the adapter {source.path} has tensors that are no part of a LoRA: "
        f"{examples(strangers)}{hint}",
        source.path,
        tensors=strangers[:10],
    )


def _module(source: _Tensors, name: str, keys: Mapping[str, str]) -> AdapterModule:
    """The module of some tensors, once they go together; its scale is still to be set."""
    needed = ("a", "b", "m") if source.is_dora else ("a", "b")
    if missing := [part for part in needed if part not in keys]:
        called = {"a": "A", "b": "B", "m": "magnitude"}[missing[0]]
        raise refusal(
            f"the adapter {source.path} has no {called} for {name}; save it again",
            source.path,
            tensors=sorted(keys.values()),
        )
    if empty := [key for key in keys.values() if 0 in source.tensors[key].shape]:
        raise _empty(source, empty)
    a, b = source.tensors[keys["a"]].shape, source.tensors[keys["b"]].shape
    num_experts, transposed = None, source.transposed
    if len(a) == len(b) == 3 and not transposed and a[0] == b[0]:
        num_experts, a, b, transposed = a[0], a[1:], b[1:], True
    if len(a) != 2 or len(b) != 2:
        raise _bad_shapes(source, name, keys)
    num_in, rank = (a[1], a[0]) if transposed else a
    num_out, rank_b = (b[0], b[1]) if transposed else (b[1], b[0])
    if rank != rank_b:
        raise _bad_shapes(source, name, keys, f"; A has rank {rank}, B has rank {rank_b}")
    if "m" in keys and source.tensors[keys["m"]].shape not in ((num_out,), (num_in,)):
        raise _bad_shapes(source, name, keys)
    for key in keys.values():
        if source.tensors[key].dtype not in FLOATS:
            raise refusal(
                f"{key} of the adapter {source.path} is {source.tensors[key].dtype}, which is none "
                f"of {', '.join(FLOATS)}; save it again as one of them",
                source.path,
                tensors=[key],
            )
    return AdapterModule(
        name=name,
        rank=rank,
        scale=1.0,
        key_a=keys["a"],
        key_b=keys["b"],
        key_m=keys.get("m"),
        file=source.file,
        transposed=transposed,
        in_features=num_in,
        out_features=num_out,
        num_experts=num_experts,
    )


def _empty(source: _Tensors, empty: list[str]) -> Exception:
    """The refusal of tensors without elements; a training over several devices leaves them."""
    return refusal(
        f"the adapter {source.path} holds tensors without values: {examples(sorted(empty))}. "
        "DeepSpeed's ZeRO-3 and FSDP leave such where the parts on each device were not gathered: "
        "save it again with stage3_gather_16bit_weights_on_model_save, from Accelerate's "
        "get_state_dict, or with zero_to_fp32.py from the training's checkpoint",
        source.path,
        tensors=sorted(empty)[:10],
    )


def _bad_shapes(
    source: _Tensors, name: str, keys: Mapping[str, str], problem: str = ""
) -> Exception:
    shapes = ", ".join(f"{key} {list(source.tensors[key].shape)}" for key in sorted(keys.values()))
    return refusal(
        f"the tensors of {name} in the adapter {source.path} do not go together: {shapes}{problem}",
        source.path,
        tensors=sorted(keys.values()),
    )


def _text(value: Any) -> str | None:
    """A reference to a base model, if it can be one."""
    is_reference = isinstance(value, str) and 0 < len(value) <= 4096 and value.isprintable()
    return value if is_reference else None
