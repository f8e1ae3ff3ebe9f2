"""A custom runner's output as JSON types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlops.errors import ServiceError

MAX_DEPTH = 64


def to_json(value: Any, depth: int = 0) -> Any:
    """Turn arrays (NumPy's and MLX's) into lists, tuples into lists, and check the rest.

    Raises:
        ServiceError: a part of the output has no form in JSON, or it is nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise ServiceError(
            f"the runner's output is nested more than {MAX_DEPTH} deep; return something flatter",
            "predict",
        )
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): to_json(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item, depth + 1) for item in value]
    if hasattr(value, "tolist"):  # arrays, and NumPy's scalars
        return to_json(value.tolist(), depth + 1)
    if isinstance(value, bool | int | float | str):  # subclasses, such as enums
        return value
    raise ServiceError(
        f"the runner's output has a {type(value).__name__}, which JSON cannot hold; return text, "
        "numbers, lists, dicts or arrays",
        "predict",
        {"type": type(value).__name__},
    )
