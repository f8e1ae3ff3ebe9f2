"""The choice of MLX's device and its memory limits, against a stand-in for a Mac's `mlx.core`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mlops.hardware import apply_memory_limits, select_device

GIB = 1 << 30


class RecordedMLX:
    """Metal as MLX shows it on a Mac with 16 GiB, or a machine without a GPU."""

    gpu, cpu = "gpu", "cpu"

    def __init__(self, has_metal: bool) -> None:
        self.metal = SimpleNamespace(is_available=lambda: has_metal)
        self.has_metal = has_metal
        self.calls: dict[str, Any] = {}

    def is_available(self, device: str) -> bool:
        return device == "cpu" or self.has_metal

    def device_info(self) -> dict[str, int]:
        return {"max_recommended_working_set_size": 11 * GIB, "memory_size": 16 * GIB}

    def set_default_device(self, device: str) -> None:
        self.calls["device"] = device

    def set_wired_limit(self, limit: int) -> None:
        self.calls["wired"] = limit

    def set_cache_limit(self, limit: int) -> None:
        self.calls["cache"] = limit


@pytest.mark.parametrize(
    ("has_metal", "enable_mps", "device"),
    [(True, True, "gpu"), (True, False, "cpu"), (False, True, "cpu"), (False, False, "cpu")],
)
def test_the_gpu_is_chosen_when_it_is_there_and_wanted(
    has_metal: bool, enable_mps: bool, device: str
) -> None:
    mx = RecordedMLX(has_metal)

    assert select_device(enable_mps, mx=mx) == device
    assert mx.calls == {"device": device}


def test_metal_gets_a_wired_and_a_cache_limit() -> None:
    mx = RecordedMLX(has_metal=True)

    limits = apply_memory_limits(True, 16 * GIB, mx=mx)

    assert limits == {"cache_limit_bytes": 1 * GIB, "wired_limit_bytes": 11 * GIB}
    assert mx.calls == {"cache": 1 * GIB, "wired": 11 * GIB}


def test_the_wired_limit_is_no_more_than_the_memory_given() -> None:
    limits = apply_memory_limits(True, 4 * GIB, mx=RecordedMLX(has_metal=True))

    assert limits["wired_limit_bytes"] == 4 * GIB


def test_without_metal_only_the_cache_is_limited() -> None:
    mx = RecordedMLX(has_metal=False)

    assert apply_memory_limits(True, 16 * GIB, mx=mx) == {"cache_limit_bytes": 1 * GIB}
    assert mx.calls == {"cache": 1 * GIB}


def test_without_unified_memory_mlx_keeps_its_own_limits() -> None:
    mx = RecordedMLX(has_metal=True)

    assert apply_memory_limits(False, 16 * GIB, mx=mx) == {}
    assert mx.calls == {}
