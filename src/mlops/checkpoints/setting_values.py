"""Are the values of settings possible at all? Their types, ranges, and what they say together."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

LARGEST_COUNT = 2**31
LARGEST_FACTOR = 1e6

_EPSILON = re.compile(r".*(^|_)eps(ilon)?")
_WINDOW = re.compile(r"sliding_window(_size)?|attention_chunk_size")
_LENGTH = re.compile(r"(original_)?max_position_embeddings|n_positions|n_ctx")
_PATTERN = "sliding_window_pattern"
_POSITIVE = re.compile(
    r"head_dim|num_key_value_heads|num_attention_heads|num_hidden_layers|hidden_size|vocab_size"
    r"|max_position_embeddings|num_experts_per_tok|query_pre_attn_scalar"
    r"|logits_scaling|(attn|final)_logit_softcapping"
)
_COUNT = re.compile(r"(num|n)_.*|.*_(size|dim|rank|layers|heads|groups|kernel)")
_FACTOR = re.compile(r".*(_multiplier|_scale|_scaling|_factor|softcapping|_scalar|_alpha|_beta)")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_GROUPS = ("n_group", "num_expert_group")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k")
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool, int), "true or false"),
    "str": ((str,), "a text"),
    "list": ((list,), "a list"),
    "sequence": ((list,), "a list"),
    "tuple": ((list,), "a list"),
    "dict": ((dict,), "an object"),
}


def impossible_values(
    settings: Mapping[str, Any], types: Mapping[str, frozenset[str]]
) -> Iterator[str]:
    """What is wrong with the values, a phrase each.

    Args:
        settings: by name.
        types: what each may be; what is not there may be anything.
    """
    for name, value in settings.items():
        if value is not None and (wanted := _wanted(name, value, settings, types.get(name))):
            yield f"{name[:80]} is {str(value)[:80]!r} in config.json, not {wanted}"
            return
    yield from _contradictions(settings)


def _wanted(
    name: str, value: Any, settings: Mapping[str, Any], types: frozenset[str] | None
) -> str | None:
    """What the value should be, where it is not."""
    if _WINDOW.fullmatch(name):
        is_used = settings.get("use_sliding_window") is not False
        return None if not is_used or _is_count(value, 1) else "a positive number of tokens"
    if _LENGTH.fullmatch(name):
        return None if _is_count(value, 1) else "a positive number of tokens"
    if types is None or name == _PATTERN:
        return None
    known = [_TYPES[each] for each in sorted(types) if each in _TYPES]
    if known and "any" not in types and not any(isinstance(value, kinds) for kinds, _ in known):
        return " or ".join(dict.fromkeys(phrase for _, phrase in known))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return _wanted_number(name, value)


def _wanted_number(name: str, value: float) -> str | None:
    if _EPSILON.fullmatch(name):
        return None if 0 <= value < 1 else "a number from 0 to 1"
    if not abs(value) <= sys.float_info.max:  # NaN too
        return "a finite number"
    if _POSITIVE.fullmatch(name) and value <= 0:
        return "a positive number"
    if _COUNT.fullmatch(name) and not 0 <= value <= LARGEST_COUNT:
        return "a possible number"
    if _FACTOR.fullmatch(name) and abs(value) > LARGEST_FACTOR:
        return "a possible factor"
    return None


def _contradictions(settings: Mapping[str, Any]) -> Iterator[str]:
    def first(*names: str) -> tuple[str, int]:
        return next(
            ((name, settings[name]) for name in names if _is_count(settings.get(name), 1)), ("", 0)
        )

    experts, num_experts = first(*_EXPERTS)
    chosen, num_chosen = first(*_CHOSEN)
    if num_experts > 1 and num_chosen > num_experts:
        yield f"{chosen} is {num_chosen} in config.json, and {experts} only {num_experts}"
    heads, shared = first("num_attention_heads")[1], first("num_key_value_heads")[1]
    if heads and shared and heads % shared:
        yield (
            f"num_attention_heads is {heads} in config.json, not a multiple of "
            f"num_key_value_heads, which is {shared}"
        )
    groups, top = first(*_GROUPS)[1], first("topk_group")[1]
    if groups and top > groups:
        yield f"topk_group is {top} in config.json, and n_group only {groups}"
    if groups and num_experts % groups:
        yield f"{experts} is {num_experts} in config.json, not a multiple of n_group, {groups}"


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and least <= value <= LARGEST_COUNT
