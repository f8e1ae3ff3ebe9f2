"""Does `config.json` describe these tensors? Found from shapes alone, before anything is loaded.

Architectures differ, so there are two levels. For every architecture: embeddings, the width that
attention reads and the number of layers, where their names are the usual ones. For the plain
decoders in `PLAIN_DECODERS`: also heads, feed-forward widths, and that no tensor is missing. What
cannot be known from names is left to the loader.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlops.checkpoints.checkpoint import TensorInfo
from mlops.checkpoints.refusal import refusal
from mlops.checkpoints.tensors import WeightShapes
from mlops.counts import count

PLAIN_DECODERS = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "mixtral"})
TIED_ALWAYS = frozenset({"gemma", "gemma2"})

_EMBEDDINGS = frozenset({"embed_tokens", "wte", "tok_embeddings", "word_embeddings", "embed_in"})
_LAYER = re.compile(r"^(.*?\b(?:\w*layers|h|blocks))\.(\d+)\.")
_OTHER_TOWERS = ("vision", "visual", "audio", "image", "speech", "mtp", "encoder", "predict")
_COUNT = re.compile(r"(?:^|_)(?:num|n)_(?:\w+_)?(?:layers?|experts?|blocks|loops|heads|inputs)$")
_LISTED = re.compile(r"layer|block|pattern")
MAX_MODULES = 4096
"""More layers, experts or heads than any model has: building them would not end."""

LARGEST_NUMBER = 2**63
"""JSON has larger ones, which are no floating-point number either."""

_ALIASES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
}


def check_consistency(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> None:
    """Raise `PackagingError` when the configuration contradicts the tensors."""
    text_config = config.get("text_config")
    fields = {**config, **(text_config if isinstance(text_config, dict) else {})}
    fields["model_type"] = config["model_type"]
    for problem in _problems(fields, WeightShapes(tensors, config)):
        raise refusal(
            f"config.json does not match the weights: {problem}; use the config.json that was "
            "saved with them",
            path,
            problem=problem,
        )


def _problems(config: Mapping[str, Any], shapes: WeightShapes) -> Iterator[str]:
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        value = _field(config, name)
        if value is None and config["model_type"] in PLAIN_DECODERS:
            yield f"{name} is not set"
        if value is not None and (type(value) is not int or value < 1):
            yield f"{name} is {str(value)[:80]!r}, not a positive number"
    yield from _quantization_problems(config, shapes)
    modules = sorted(name.removesuffix(".weight") for name in shapes.tensors)
    for module in modules:
        if not any(tower in module for tower in _OTHER_TOWERS):
            for axis, width, field in _expected(module, config):
                yield from _compare(module, axis, width, field, shapes)
    yield from _layer_problems(config, shapes.tensors)
    if config.get("model_type") in PLAIN_DECODERS:
        yield from _missing(config, shapes.tensors)
    yield from _unbounded(config)


def _unbounded(config: Mapping[str, Any]) -> Iterator[str]:
    """What mlx-lm makes so many modules of, for tensors that may not even be there."""
    pending: list[Mapping[str, Any]] = [config]
    while pending:
        for name, value in pending.pop().items():
            if isinstance(value, dict) and name not in ("quantization", "quantization_config"):
                pending.append(value)
            is_number = isinstance(value, int | float) and _COUNT.search(name)
            length = value if is_number else 0
            if isinstance(value, str | list) and _LISTED.search(name):
                length = len(value)
            if type(value) is int and abs(value) > LARGEST_NUMBER:
                yield f"{name[:80]} is {str(value)[:20]}..., a number that nothing computes with"
            if length > MAX_MODULES:
                yield f"{name[:80]} is {str(length)[:20]}, and no model has so many"


def _quantization_problems(config: Mapping[str, Any], shapes: WeightShapes) -> Iterator[str]:
    if any(config.get(key) for key in ("quantization", "quantization_config")):
        return
    for name in shapes.tensors:
        module = name.removesuffix(".scales")
        if module != name and shapes.is_packed(module):
            yield f"{module} is quantized, but quantization is not set"
            return


def _expected(module: str, config: Mapping[str, Any]) -> Iterator[tuple[int, int | None, str]]:
    """What the configuration says of a module's weight: (axis, length, name of the field)."""
    leaf = module.rpartition(".")[2]
    hidden = _field(config, "hidden_size")
    if leaf in _EMBEDDINGS or module == "lm_head":
        yield -2, config.get("vocab_size"), "vocab_size"
        yield -1, hidden, "hidden_size"
    elif leaf in {"q_proj", "k_proj", "v_proj", "input_layernorm"}:
        yield -1, hidden, "hidden_size"
    if config.get("model_type") not in PLAIN_DECODERS:
        return
    heads = _field(config, "num_attention_heads")
    head_dim = config.get("head_dim")
    if head_dim is None and isinstance(hidden, int) and isinstance(heads, int):
        head_dim = hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    intermediate = config.get("intermediate_size")
    if leaf == "q_proj":
        yield -2, _product(heads, head_dim), "num_attention_heads"
    elif leaf in {"k_proj", "v_proj"}:
        yield -2, _product(kv_heads, head_dim), "num_key_value_heads"
    elif leaf == "o_proj":
        yield -1, _product(heads, head_dim), "num_attention_heads"
        yield -2, hidden, "hidden_size"
    elif leaf in {"gate_proj", "up_proj", "w1", "w3"}:
        yield -2, intermediate, "intermediate_size"
        yield -1, hidden, "hidden_size"
    elif leaf in {"down_proj", "w2"}:
        yield -2, hidden, "hidden_size"
        yield -1, intermediate, "intermediate_size"


def _compare(
    module: str, axis: int, length: int | None, field: str, shapes: WeightShapes
) -> Iterator[str]:
    weight = shapes.tensors.get(f"{module}.weight")
    if weight is None or not isinstance(length, int):
        return
    columns = shapes.possible_columns(module)
    if len(weight.shape) == 1:
        found = list(weight.shape) if axis == -1 else []
    else:
        found = columns if axis == -1 or not columns else [weight.shape[axis]]
    if found and length not in found:
        yield (
            f"by {field} {module}.weight should be {length} "
            f"{'wide' if axis == -1 else 'high'}, but it is {found[0]}"
        )


def _layer_problems(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    num_layers = _field(config, "num_hidden_layers")
    is_plain = config.get("model_type") in PLAIN_DECODERS
    has_two_counts = config.get("num_layers") not in (None, num_layers)
    if type(num_layers) is not int or (has_two_counts and not is_plain):
        return
    stacks: dict[str, set[int]] = defaultdict(set)
    for name in tensors:
        match = _LAYER.match(name)
        if match and not any(tower in match[1] for tower in _OTHER_TOWERS):
            stacks[match[1]].add(int(match[2][:9]))
    if not stacks and not is_plain:
        return
    # Other architectures split their layers over stacks, or keep draft layers past the last.
    found = {number for stack in stacks.values() for number in stack}
    num_found = len(found) if is_plain else sum(len(stack) for stack in stacks.values())
    is_all = num_found == num_layers and found == set(range(num_found))
    if not (is_all if is_plain else num_found >= num_layers):
        yield f"num_hidden_layers is {num_layers}, but the weights have {count(num_found, 'layer')}"


def _missing(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    present = {name.rpartition(".")[0] for name in tensors}
    num_layers = _field(config, "num_hidden_layers") or 0
    wanted = ["model.embed_tokens", "model.norm"]
    is_untied = config.get("tie_word_embeddings") is False
    if is_untied and config["model_type"] not in TIED_ALWAYS:
        wanted.append("lm_head")
    parts = ["input_layernorm", "post_attention_layernorm"]
    parts += [f"self_attn.{name}_proj" for name in "qkvo"]
    if config["model_type"] != "mixtral":
        parts += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    wanted += [f"model.layers.{number}.{part}" for number in range(num_layers) for part in parts]
    for module in wanted:
        if module not in present:
            yield f"the weights of {module} are missing"


def _field(config: Mapping[str, Any], name: str) -> Any:
    return next((config[key] for key in _ALIASES.get(name, (name,)) if key in config), None)


def _product(first: Any, second: Any) -> int | None:
    return first * second if isinstance(first, int) and isinstance(second, int) else None
