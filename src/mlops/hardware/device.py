"""Where MLX computes and how much memory it may keep. The one place that decides either."""

from __future__ import annotations

from typing import Any, Literal

from mlops.errors import MissingDependencyError
from mlops.hardware.blas import ensure_blas
from mlops.hardware.machine import detect

CACHE_SHARE = 16
"""MLX may keep one part in 16 of the memory as freed buffers to use again."""


def select_device(enable_mps: bool = True, mx: Any = None) -> Literal["gpu", "cpu"]:
    """Make the GPU MLX's default device, or the CPU when there is none or `enable_mps` is False.

    Call it in the thread that is going to compute. `mx` stands in for `mlx.core` in tests.

    Raises:
        MissingDependencyError: MLX is not installed.
    """
    mx = mx or _import_mlx()
    use_gpu = enable_mps and bool(mx.is_available(mx.gpu))
    mx.set_default_device(mx.gpu if use_gpu else mx.cpu)
    return "gpu" if use_gpu else "cpu"


def apply_memory_limits(
    enable_unified_memory: bool, memory_bytes: int | None = None, mx: Any = None
) -> dict[str, int]:
    """Tell MLX how much memory to hold resident (Metal only) and how much to keep for reuse.

    Args:
        enable_unified_memory: False leaves MLX's own limits as they are.
        memory_bytes: the memory to share out; this machine's when None.
        mx: stands in for `mlx.core` in tests.

    Returns:
        what was set: `wired_limit_bytes` on Metal, and `cache_limit_bytes`; empty when nothing was.

    Raises:
        MissingDependencyError: MLX is not installed.
    """
    mx = mx or _import_mlx()
    memory_bytes = memory_bytes or detect().memory_bytes
    if not enable_unified_memory or not memory_bytes:
        return {}
    limits = {"cache_limit_bytes": memory_bytes // CACHE_SHARE}
    mx.set_cache_limit(limits["cache_limit_bytes"])
    if mx.metal.is_available():
        # More than the system recommends is an error in MLX.
        allowed = int(mx.device_info()["max_recommended_working_set_size"])
        limits["wired_limit_bytes"] = min(allowed, memory_bytes)
        mx.set_wired_limit(limits["wired_limit_bytes"])
    return limits


def _import_mlx() -> Any:
    ensure_blas()
    try:
        import mlx.core
    except ImportError as error:
        raise MissingDependencyError("mlx") from error
    return mlx.core
