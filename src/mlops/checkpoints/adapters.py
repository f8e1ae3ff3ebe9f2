"""LoRA and DoRA adapters, in mlx-lm's format and in Hugging Face PEFT's.

An adapter that loads and then does nothing, or something else than it was trained to do, is worse
than one that is refused. So every tensor must belong to a module, A and B must pair up, and every
kind of adapter that would need more than `base(x) + scale * (x @ A @ B)` is refused by name.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlops.checkpoints.checkpoint import (
    AdapterInfo,
    AdapterModule,
    Checkpoint,
    CheckpointKind,
    TensorInfo,
    size_of_model,
)
from mlops.checkpoints.files import CheckpointFile, read_json
from mlops.checkpoints.refusal import examples, refusal
from mlops.checkpoints.safetensors import BITS
from mlops.checkpoints.tensors import WeightShapes, read_tensors

CONFIG = "adapter_config.json"
MLX_LM_WEIGHTS = "adapters.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"

FLOATS = ("F32", "F16", "BF16")

LARGEST_SCALE = 1e4
"""Of an adapter, alpha over rank: trained ones have 0.1 to some 100."""

_MLX_KEY = re.compile(r"^(?P<module>.+)\.(?P<part>lora_a|lora_b|m)$")
_PEFT_KEY = re.compile(
    r"^base_model\.model\.(?P<module>.+)\."
    r"(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?:\.weight)?$"
)
_PARTS = {
    "lora_a": "a", "lora_b": "b", "m": "m",
    "lora_A": "a", "lora_B": "b", "lora_embedding_A": "a", "lora_embedding_B": "b",
    "lora_magnitude_vector": "m",
}  # fmt: skip
_UNCHANGED_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
"""PEFT's `init_lora_weights` that leave the base model's weights as they are."""

_NOT_SUPPORTED = (
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "lora_bias",
    "alora_invocation_tokens",
)
"""PEFT settings that make an adapter more than a low-rank update of named modules."""

_KNOWN_USES = frozenset({"use_rslora", "use_dora"})


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
    info = read_format(path, config, tensors, files[weights[0]].path)
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
    )


def check_adapter_fits(adapter: Checkpoint, base: Checkpoint) -> None:
    """Raise `PackagingError` when the adapter was trained on another base model.

    Names and shapes are compared. Experts that a Transformers checkpoint stores one by one are left
    to the loader, which stacks them.
    """
    if adapter.adapter is None:
        raise refusal(f"{adapter.path} is not an adapter", adapter.path, "check_adapter_fits")
    if base.kind is not CheckpointKind.LANGUAGE_MODEL:
        raise refusal(
            f"the base of the adapter {adapter.path} is {base.description}, not a language model",
            adapter.path,
            "check_adapter_fits",
            base=str(base.path),
        )
    shapes = WeightShapes(base.tensors, base.config)
    names = _base_modules(base)
    wrong: dict[str, str] = {}
    for module in adapter.adapter.modules.values():
        stored = names.get(module.name)
        if stored is None and base.framework != "mlx":
            stored = names.get(_from_layers(module.name))
        if stored is None:
            if base.framework == "mlx" or "experts" not in _siblings(module.name, names):
                wrong[module.key_a] = f"{module.key_a}: the base has no {module.name}"
        elif problem := _misfit(module, stored, shapes):
            wrong[module.key_a] = f"{module.key_a}: {problem}"
    if wrong:
        raise refusal(
            f"the adapter {adapter.path} belongs to another base model than {base.path}: "
            f"{'; '.join(list(wrong.values())[:3])}"
            + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""),
            adapter.path,
            "check_adapter_fits",
            base=str(base.path),
            tensors=list(wrong)[:3],
        )


def adapter_delta_is_zero(adapter: Checkpoint) -> bool:
    """True when the adapter changes nothing: for every module A or B is all zeros, or the scale is.

    So are adapters before training. Only bytes are looked at, up to the first that is not zero.
    DoRA's magnitudes are not: they only ever move together with B.
    """
    if adapter.adapter is None:
        raise refusal(f"{adapter.path} is not an adapter", adapter.path, "adapter_delta_is_zero")
    return all(
        module.scale == 0
        or _is_zero(module.file, adapter.tensors[module.key_b])
        or _is_zero(module.file, adapter.tensors[module.key_a])
        for module in adapter.adapter.modules.values()
    )


@dataclass(frozen=True)
class _Tensors:
    """An adapter's tensors and how its format names and lays them out."""

    path: Path
    file: Path
    tensors: Mapping[str, TensorInfo]
    key_pattern: re.Pattern[str]
    is_dora: bool
    transposed: bool


def _read_mlx_lm(
    path: Path, config: dict[str, Any], tensors: Mapping[str, TensorInfo], file: Path
) -> AdapterInfo:
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
    number = _number(scale)
    if number is None:
        raise refusal(
            f"lora_parameters.scale in {CONFIG} is {str(scale)[:80]!r}, not a number: write the "
            "scale that the adapter was trained with",
            path,
            file=CONFIG,
        )
    modules = _pair(
        _Tensors(path, file, tensors, _MLX_KEY, kind == "dora", transposed=False),
        lambda module, rank: number,
    )
    return AdapterInfo("mlx-lm", kind, _text(config.get("model")), modules)


def _read_peft(
    path: Path, config: dict[str, Any], tensors: Mapping[str, TensorInfo], file: Path
) -> AdapterInfo:
    _refuse_other_peft(path, config)
    alpha = _number(config.get("lora_alpha"))
    if alpha is None:
        raise refusal(
            f"lora_alpha in {CONFIG} is {str(config.get('lora_alpha'))[:80]!r}, not a number: "
            "write the one that the adapter was trained with",
            path,
            file=CONFIG,
        )
    alphas = _alpha_pattern(path, config.get("alpha_pattern") or {})
    is_rank_stable = bool(config.get("use_rslora"))

    def scale(module: str, rank: int) -> float:
        own = next((value for matches, value in alphas if matches(module)), alpha)
        return own / (math.sqrt(rank) if is_rank_stable else rank)

    is_dora = bool(config.get("use_dora"))
    modules = _pair(_Tensors(path, file, tensors, _PEFT_KEY, is_dora, transposed=True), scale)
    base = _text(config.get("base_model_name_or_path"))
    return AdapterInfo("peft", "dora" if is_dora else "lora", base, modules)


def _refuse_other_peft(path: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise refusal(
            f"peft_type in {CONFIG} is {str(config.get('peft_type'))[:80]!r}; only LORA is "
            "supported",
            path,
            setting="peft_type",
        )
    others = [name for name, value in config.items() if name.startswith("use_") and value is True]
    for name in (*_NOT_SUPPORTED, *sorted(set(others) - _KNOWN_USES)):
        if config.get(name):
            raise refusal(
                f"the PEFT adapter {path} uses {examples([name[:80]])}, which is not supported; "
                "merge it into its model with PEFT and package the result",
                path,
                setting=name[:80],
            )
    if config.get("bias", "none") != "none":
        raise refusal(
            f"the PEFT adapter {path} has bias {str(config['bias'])[:80]!r}, which is not "
            "supported; merge it into its model with PEFT and package the result",
            path,
            setting="bias",
        )
    if config.get("init_lora_weights") not in _UNCHANGED_BASE:
        raise refusal(
            f"the PEFT adapter {path} has init_lora_weights "
            f"{str(config['init_lora_weights'])[:80]!r}, which also changes the base "
            "model; convert it to plain LoRA when saving it "
            "(path_initial_model_for_weight_conversion)",
            path,
            setting="init_lora_weights",
        )


def _pair(source: _Tensors, scale_of: Callable[[str, int], float]) -> dict[str, AdapterModule]:
    """Every tensor to its module, or `PackagingError`."""
    path = source.path
    found: dict[str, dict[str, str]] = {}
    strangers = []
    for key in sorted(source.tensors):
        match = source.key_pattern.match(key)
        part = _PARTS[match["part"]] if match else ""
        if match is None or (part == "m" and not source.is_dora):
            strangers.append(key)
        elif part in found.setdefault(match["module"], {}):
            raise refusal(f"the adapter {path} has {key} under two names", path, tensors=[key])
        else:
            found[match["module"]][part] = key
    if strangers:
        raise refusal(
            f"the adapter {path} has tensors that are no part of a LoRA: {examples(strangers)}",
            path,
            tensors=strangers[:10],
        )
    if not found:
        raise refusal(f"the adapter {path} holds no tensors", path)
    modules = {}
    for name, keys in sorted(found.items()):
        module = _module(source, name, keys)
        scale = scale_of(name, module.rank)
        if not abs(scale) <= LARGEST_SCALE:
            raise refusal(
                f"the adapter {source.path} has the scale {scale:g} for {name}: nothing is trained "
                f"with more than {LARGEST_SCALE:g}, so the scale or alpha in {CONFIG} is wrong; "
                "write the one that it was trained with",
                source.path,
                file=CONFIG,
            )
        modules[name] = replace(module, scale=scale)
    return modules


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
    a, b = source.tensors[keys["a"]].shape, source.tensors[keys["b"]].shape
    num_experts, transposed = None, source.transposed
    if len(a) == len(b) == 3 and not transposed and a[0] == b[0]:
        num_experts, a, b, transposed = a[0], a[1:], b[1:], True
    if len(a) != 2 or len(b) != 2:
        raise _bad_shapes(source, name, keys)
    num_in, rank = (a[1], a[0]) if transposed else a
    num_out, rank_b = (b[0], b[1]) if transposed else (b[1], b[0])
    if rank != rank_b or 0 in (rank, num_in, num_out, num_experts):
        raise _bad_shapes(source, name, keys)
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


def _bad_shapes(source: _Tensors, name: str, keys: Mapping[str, str]) -> Exception:
    shapes = ", ".join(f"{key} {list(source.tensors[key].shape)}" for key in sorted(keys.values()))
    return refusal(
        f"the tensors of {name} in the adapter {source.path} do not go together: {shapes}",
        source.path,
        tensors=sorted(keys.values()),
    )


def _alpha_pattern(path: Path, pattern: Any) -> list[tuple[Callable[[str], bool], float]]:
    """PEFT's `alpha_pattern`: a key means modules of this name, at the end of a path or, after `^`,
    the whole path. Regular expressions proper are refused: a stranger's can take forever."""
    found = []
    for key, value in pattern.items() if isinstance(pattern, dict) else [("alpha_pattern", None)]:
        number = _number(value)
        name = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if number is None or not re.fullmatch(r"[A-Za-z0-9_.]{1,512}", name):
            raise refusal(
                f"alpha_pattern in {CONFIG} has {key[:80]!r}: {str(value)[:40]}; only module names "
                "with a number are read: write them out",
                path,
                setting="alpha_pattern",
            )
        found.append((_name_matcher(name, from_start=key.startswith("^")), number))
    return found


def _name_matcher(name: str, from_start: bool) -> Callable[[str], bool]:
    return lambda module: module == name or (not from_start and module.endswith(f".{name}"))


def _base_modules(base: Checkpoint) -> dict[str, str]:
    """Modules with a weight, by their name and by their name from `layers` on.

    Some loaders add or drop a prefix (`model.`, `language_model.`), so both are looked up.
    """
    modules = [name.removesuffix(".weight") for name in base.tensors if name.endswith(".weight")]
    by_tail: dict[str, list[str]] = {}
    for name in modules:
        by_tail.setdefault(_from_layers(name), []).append(name)
    unique = {tail: names[0] for tail, names in by_tail.items() if len(names) == 1}
    return unique | {name: name for name in modules}


def _from_layers(name: str) -> str:
    match = re.search(r"\b(?:layers|h|blocks)\.\d+\..*$", name)
    return match[0] if match else name.removeprefix("model.")


def _siblings(name: str, names: Mapping[str, str]) -> str:
    """All modules in the block that should hold an expert, as one text to search."""
    block = _from_layers(name).partition(".switch_mlp")[0]
    return " ".join(key for key in names if key.startswith(f"{block}.")) if block else ""


def _misfit(module: AdapterModule, stored: str, shapes: WeightShapes) -> str:
    """Why the update does not fit the weight, or "" when it does or cannot be known."""
    columns, rows = shapes.possible_columns(stored), shapes.leading(stored)
    if not columns or not rows:
        return ""
    wanted = (module.in_features, module.out_features)
    leaf = stored.rpartition(".")[2]
    is_embedding = "emb" in leaf or leaf == "wte"
    row, column = wanted if is_embedding else (wanted[1], wanted[0])
    experts = (module.num_experts,) if module.num_experts is not None else ()
    if rows == (*experts, row) and column in columns:
        return ""
    return (
        f"it takes {wanted[0]} and gives {wanted[1]} values, but the base's weight is "
        f"{[*rows, columns[0]]}"
    )


def _is_zero(path: Path, tensor: TensorInfo) -> bool:
    """True when all elements are 0 or -0, in any floating-point type."""
    width = BITS[tensor.dtype] // 8
    chunk_bytes = 1 << 20
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        end = tensor.offset + tensor.nbytes
        for start in range(tensor.offset, end, chunk_bytes):
            chunk = view[start : min(start + chunk_bytes, end)]
            if not chunk.strip(b"\x00"):
                continue
            signs = chunk[width - 1 :: width]  # little-endian: the sign is in the last byte
            if signs.strip(b"\x00\x80") or any(
                chunk[place::width].strip(b"\x00") for place in range(width - 1)
            ):
                return False
    return True


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _text(value: Any) -> str | None:
    """A reference to a base model, if it can be one."""
    is_reference = isinstance(value, str) and 0 < len(value) <= 4096 and value.isprintable()
    return value if is_reference else None
