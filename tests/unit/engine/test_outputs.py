"""What a custom runner may return."""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import pytest

from mlops.errors import ServiceError
from mlops.serving.runner.outputs import to_json


class Colour(enum.StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (None, None),
        ("text", "text"),
        (np.float32(1.5), 1.5),
        (np.arange(4).reshape(2, 2), [[0, 1], [2, 3]]),
        ({"scores": np.ones(2), 3: (1, 2)}, {"scores": [1.0, 1.0], "3": [1, 2]}),
        (Colour.RED, "red"),
    ],
)
def test_arrays_become_lists(output: Any, expected: Any) -> None:
    assert to_json(output) == expected


def test_what_json_cannot_hold_is_named() -> None:
    with pytest.raises(ServiceError, match="has a bytes") as caught:
        to_json({"image": b"..."})
    assert caught.value.operation == "predict"


def test_a_loop_ends() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ServiceError, match="nested"):
        to_json(loop)
