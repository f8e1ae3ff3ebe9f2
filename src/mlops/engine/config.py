"""The limits of one engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mlops.errors import ConfigError


@dataclass(frozen=True)
class EngineConfig:
    """What an engine may use. None chooses by the machine's memory and device.

    Attributes:
        max_rows: sequences that are computed together, at most.
        row_limit: asked at every step for a lower limit (a hot machine); None is no other limit.
        max_waiting: requests that may wait before more are refused.
        max_prompt_tokens: the longest prompt; None leaves it to the model's context.
        prefill_tokens: prompt tokens computed between two decode steps, at most.
        memory_bytes: what weights, caches and adapters may take together; the defaults of the
            following are shares of what the weights leave.
        cache_memory_bytes: what the KV caches of admitted requests may take, at their longest.
        prefix_memory_bytes: what the prefix cache keeps; 0 turns it off.
        adapter_memory_bytes: what resident adapters may take.
        max_resident_adapters: how many adapters may be resident; None is as many as fit.

    Raises:
        ConfigError: a limit is below what it can be.
    """

    max_rows: int = 32
    row_limit: Callable[[], int] | None = None
    max_waiting: int = 256
    max_prompt_tokens: int | None = None
    prefill_tokens: int | None = None
    memory_bytes: int | None = None
    cache_memory_bytes: int | None = None
    prefix_memory_bytes: int | None = None
    adapter_memory_bytes: int | None = None
    max_resident_adapters: int | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("max_rows", 1),
            ("max_waiting", 0),
            ("max_prompt_tokens", 1),
            ("prefill_tokens", 1),
            ("memory_bytes", 0),
            ("cache_memory_bytes", 0),
            ("prefix_memory_bytes", 0),
            ("adapter_memory_bytes", 0),
            ("max_resident_adapters", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"EngineConfig.{name} must be at least {least}, not {value}")
