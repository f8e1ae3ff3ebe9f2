"""Engines over tiny models for the tests, and what mlx-lm itself says to the same prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlops import engine
from mlops.checkpoints import recognise
from mlops.engine import EngineConfig, GenerationRequest, GenerationResult, LoadedModel

TIMEOUT_S = 60.0


@contextmanager
def running(
    loaded: LoadedModel, adapters: Mapping[str, Path] | None = None, **limits: Any
) -> Iterator[engine.Engine]:
    """An engine until the block ends; `limits` are fields of `EngineConfig`."""
    one = engine.Engine(loaded, EngineConfig(**limits))
    try:
        for name, folder in (adapters or {}).items():
            one.add_adapter(name, recognise(folder))
        yield one
    finally:
        one.close()
        check_empty(one)
        engine.run_in_owner(lambda: [loaded.banks.unload(slot) for slot in slots_of(one)])


def slots_of(one: engine.Engine) -> list[int]:
    """Slots of the adapters that are in memory."""
    found = [one.adapters._current[name].slot for name in one.adapters.names]
    return [slot for slot in found if slot is not None]


def check_empty(one: engine.Engine) -> None:
    """Nothing is left behind: no row, no user of an adapter, no request without an end."""
    one.adapters.check()
    counts = one.statistics()
    assert (counts["running"], counts["waiting"]) == (0, 0)
    assert counts["resident_adapters"]["in_use"] == 0
    assert counts["requests"]["submitted"] == sum(counts["requests"]["finished"].values())


def ask_all(one: engine.Engine, *requests: GenerationRequest) -> list[GenerationResult]:
    """The results of requests that are submitted together."""
    generations = [one.submit(request) for request in requests]
    return [generation.result(TIMEOUT_S) for generation in generations]


def tokens_of(one: engine.Engine, *requests: GenerationRequest) -> list[tuple[int, ...]]:
    """The tokens of requests that are submitted together."""
    return [result.tokens for result in ask_all(one, *requests)]


def mlx_lm_says(
    model: Any, tokenizer: Any, request: GenerationRequest
) -> tuple[str, tuple[int, ...], str | None]:
    """Text, tokens and finish reason of mlx-lm's own greedy generation."""

    def run() -> tuple[str, tuple[int, ...], str | None]:
        from mlx_lm import stream_generate

        tokens, reason = [], None
        for response in stream_generate(
            model, tokenizer, list(request.prompt), max_tokens=request.max_tokens
        ):
            reason = response.finish_reason
            if reason != "stop":
                tokens.append(response.token)
        # Not its own text: that reads the byte 0 as another character.
        return tokenizer.decode(tokens).removeprefix(" ").rstrip("\ufffd"), tuple(tokens), reason

    return engine.run_in_owner(run)


def with_unfused_adapter(base: Path, adapter: Path) -> Any:
    """The model with mlx-lm's own adapter layers, in float32."""

    def load() -> Any:
        from mlx_lm.tuner.utils import load_adapters
        from mlx_lm.utils import load_model

        return load_adapters(load_model(base)[0], str(adapter))

    return engine.run_in_owner(load)
