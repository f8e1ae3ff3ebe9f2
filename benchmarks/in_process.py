"""One run of the `engine` benchmark: one process, both sides in it.

    python -m benchmarks.in_process throughput FOLDER SEED
    python -m benchmarks.in_process memory FOLDER
    python -m benchmarks.in_process streams FOLDER SEED NUM_REQUESTS ROWS

print raw measurements as JSON on their last line. FOLDER is what `benchmarks.models` wrote. The
BLAS is in place before MLX loads, so mlx-lm's side has it too. mlx-lm's functions run in the thread
that owns MLX, with their own copy of the model, while no engine is open.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.models import Prompt, adapter_folders, make_prompts
from mlops import engine
from mlops.checkpoints import recognise

NUM_TOKENS = 64
STREAM_TOKENS = 128
OVERHEAD_TOKENS = 96
PREFIX_TOKENS = 1000
REPEATS = 2
"""Of both sides in turn, within a run."""

NUM_ADAPTERS = 64
ADAPTER_MEMORY_BYTES = 2**30
TIMEOUT_S = 300.0

Measurements = dict[str, float]


class _Peer:
    """mlx-lm with a model and caches of its own; its methods run in the owner thread."""

    def __init__(self, model: Path) -> None:
        from mlx_lm import load

        self._model, self._tokenizer = load(str(model))

    def batch_seconds(self, prompts: Sequence[Prompt]) -> float:
        """For `batch_generate` with 16 rows in decoding and its default of 8 in prefill."""
        from mlx_lm import batch_generate

        start_s = time.perf_counter()
        answer = batch_generate(
            self._model,
            self._tokenizer,
            [list(prompt) for prompt in prompts],
            max_tokens=NUM_TOKENS,
            completion_batch_size=len(prompts),
            return_token_ids=True,
        )
        elapsed_s = time.perf_counter() - start_s
        _check_lengths(answer.token_ids, NUM_TOKENS)
        return elapsed_s

    def stream_seconds(self, prompt: Prompt) -> float:
        """For `stream_generate`, to its last token."""
        from mlx_lm import stream_generate

        start_s = time.perf_counter()
        tokens = [
            piece.token
            for piece in stream_generate(
                self._model, self._tokenizer, list(prompt), max_tokens=STREAM_TOKENS
            )
        ]
        elapsed_s = time.perf_counter() - start_s
        _check_lengths([tokens], STREAM_TOKENS)
        return elapsed_s


def _forward_seconds(
    loaded: engine.LoadedModel, prompts: Sequence[Prompt], num_steps: int
) -> float:
    """A decode step of the engine's model and caches, the largest logit taken, and no more.

    No requests, no text, no scheduler. The next step is under way while the tokens of the last are
    read. The prompts have one length. In the owner thread.
    """
    import mlx.core as mx

    from mlops.engine.kv import BatchCaches
    from mlops.engine.prefill import new_caches, prefill

    caches = BatchCaches(len(prompts))
    empty = [new_caches(loaded.model) for _ in prompts]
    caches.join(prefill(loaded.model, empty, [prompt[:-1] for prompt in prompts]))

    def step(tokens: mx.array) -> mx.array:
        caches.prepare_step()
        tokens = mx.argmax(loaded.model(tokens[:, None], cache=caches.layers)[:, -1], axis=-1)
        caches.end_step()
        mx.async_eval(tokens, caches.arrays())  # type: ignore[no-untyped-call]
        return tokens

    tokens = step(mx.array([prompt[-1] for prompt in prompts]))
    tokens.tolist()
    start_s = time.perf_counter()
    for _ in range(num_steps):
        following = step(tokens)
        tokens.tolist()
        tokens = following
    tokens.tolist()
    return (time.perf_counter() - start_s) / num_steps


@contextlib.contextmanager
def _running(
    loaded: engine.LoadedModel, rows: int, adapters: dict[str, Path] | None = None, **config: Any
) -> Iterator[engine.Engine]:
    """An engine, warmed up at this number of rows, its adapters resident."""
    settings = engine.EngineConfig(
        max_rows=rows, adapter_memory_bytes=ADAPTER_MEMORY_BYTES, **config
    )
    running = engine.Engine(loaded, settings)
    try:
        for name, folder in (adapters or {}).items():
            running.add_adapter(name, recognise(folder))
        # Every adapter is asked once, since they are read at their first request.
        names = [*(adapters or {}), *[None] * rows]
        _answer(running, make_prompts("warm-up", len(names)), names, max_tokens=8)
        yield running
    finally:
        running.close()


def _answer(
    running: engine.Engine,
    prompts: Sequence[Prompt],
    adapters: Sequence[str | None] = (),
    max_tokens: int = NUM_TOKENS,
) -> list[engine.GenerationResult]:
    """Hand over all prompts at once; their results when the last is there."""
    requests = [
        engine.GenerationRequest(
            prompt=prompt,
            max_tokens=max_tokens,
            adapter=adapters[number % len(adapters)] if adapters else None,
        )
        for number, prompt in enumerate(prompts)
    ]
    generations = [running.submit(request) for request in requests]
    results = [generation.result(timeout_s=TIMEOUT_S) for generation in generations]
    _check_lengths([result.tokens for result in results], max_tokens)
    return results


def _seconds(
    running: engine.Engine,
    prompts: Sequence[Prompt],
    adapters: Sequence[str | None] = (),
    max_tokens: int = NUM_TOKENS,
) -> float:
    start_s = time.perf_counter()
    _answer(running, prompts, adapters, max_tokens)
    return time.perf_counter() - start_s


def _check_lengths(answers: Sequence[Sequence[int]], expected: int) -> None:
    lengths = {len(tokens) for tokens in answers}
    if lengths != {expected}:
        raise SystemExit(f"answers of {sorted(lengths)} tokens, not all of {expected}")


def _in_turn(
    sides: dict[str, Callable[[int], float]], num_tokens: int, repeats: int = REPEATS
) -> Measurements:
    """Tokens per second of each side, over all repeats; in each every side has its turn."""
    seconds = dict.fromkeys(sides, 0.0)
    for number in range(repeats):
        for name, measure in sides.items():
            seconds[name] += measure(number)
    return {f"{name}_tokens_per_s": num_tokens * repeats / seconds[name] for name in sides}


def measure_throughput(folder: Path, seed: str) -> dict[str, Measurements]:
    """All figures but memory; each entry is the raw measurements of one of them."""
    base = folder / "base"
    adapters = adapter_folders(folder, NUM_ADAPTERS)
    eight = dict(list(adapters.items())[:8])
    plain = engine.load_model(base)
    banked = engine.load_model(base)
    peer = engine.run_in_owner(_Peer, base)

    def prompts(what: str, count: int, number: int) -> list[Prompt]:
        return make_prompts(f"{seed}, {what}, {number}", count)

    def ours_offline(number: int) -> float:
        with _running(plain, 16) as running:
            return _seconds(running, prompts("offline", 16, number))

    def ours_alone(number: int) -> float:
        with _running(plain, 16) as running:
            _answer(running, prompts("alone, warm-up", 1, number), max_tokens=8)
            return _seconds(running, prompts("alone", 1, number), max_tokens=STREAM_TOKENS)

    def theirs_offline(number: int) -> float:
        return engine.run_in_owner(peer.batch_seconds, prompts("offline", 16, number))

    def theirs_alone(number: int) -> float:
        return engine.run_in_owner(peer.stream_seconds, prompts("alone", 1, number)[0])

    engine.run_in_owner(peer.batch_seconds, prompts("warm-up", 16, 0))
    engine.run_in_owner(peer.stream_seconds, prompts("warm-up", 1, 1)[0])
    found = {
        "offline": _in_turn({"our": ours_offline, "peer": theirs_offline}, 16 * NUM_TOKENS),
        "alone": _in_turn({"our": ours_alone, "peer": theirs_alone}, STREAM_TOKENS),
        "overhead": _measure_overhead(plain, seed),
        "prefix": _measure_prefix(plain, seed),
    }
    with _running(plain, 16) as without, _running(banked, 16, eight) as running:
        found["unused"] = _in_turn(
            {
                "disabled": lambda n: _seconds(without, prompts("unused", 16, n)),
                "enabled": lambda n: _seconds(running, prompts("unused", 16, n)),
            },
            16 * NUM_TOKENS,
            2 * REPEATS,
        )
        found["mixed_8"] = _measure_mixed(running, list(eight), 16, seed)
    with _running(banked, 64, adapters) as running:
        found["mixed_64"] = _measure_mixed(running, list(adapters), 64, seed)
    return found


def _measure_mixed(
    running: engine.Engine, names: Sequence[str], rows: int, seed: str
) -> Measurements:
    """One row after the other with the next adapter, against base rows in the same engine."""

    def prompts(kind: str, number: int) -> list[Prompt]:
        return make_prompts(f"{seed}, {kind} of {len(names)}, {number}", rows)

    return _in_turn(
        {
            "base": lambda number: _seconds(running, prompts("base", number)),
            "mixed": lambda number: _seconds(running, prompts("mixed", number), names),
        },
        rows * NUM_TOKENS,
    )


def _measure_overhead(loaded: engine.LoadedModel, seed: str) -> Measurements:
    """A decode step of 32 rows, by the engine and by its model alone, at the same cache lengths.

    All prompts have 32 tokens and prefill takes them at once, so from its first token to its last
    a row sees decode steps of the whole batch only.
    """
    prompts = make_prompts(f"{seed}, overhead", 32, shortest=32, longest=32)
    num_steps = OVERHEAD_TOKENS - 1
    steps_ms, forwards_ms = [], []
    for _ in range(REPEATS):
        with _running(loaded, 32, prefill_tokens=32 * 32) as running:
            results = _answer(running, prompts, max_tokens=OVERHEAD_TOKENS)
        decoding_ms = [result.total_ms - result.first_token_ms for result in results]
        # The rows that were admitted first may have waited for the prefill of the others.
        steps_ms.append(min(decoding_ms) / num_steps)
        forward_s = engine.run_in_owner(_forward_seconds, loaded, prompts, num_steps)
        forwards_ms.append(1000 * forward_s)
    return {"step_ms": statistics.mean(steps_ms), "forward_ms": statistics.mean(forwards_ms)}


def _measure_prefix(loaded: engine.LoadedModel, seed: str) -> Measurements:
    """Time to first token of a prompt whose first 1,000 tokens are new, then were seen before."""
    prefixes = make_prompts(f"{seed}, prefix", 3, shortest=PREFIX_TOKENS, longest=PREFIX_TOKENS)
    endings = make_prompts(f"{seed}, ending", 6, shortest=16, longest=16)
    cold_ms: list[float] = []
    repeated_ms: list[float] = []
    cached_tokens = []
    with _running(loaded, 16) as running:
        for number, prefix in enumerate(prefixes):
            for times, ending in ((cold_ms, number), (repeated_ms, number + len(prefixes))):
                (result,) = _answer(running, [prefix + endings[ending]], max_tokens=8)
                times.append(result.first_token_ms)
            cached_tokens.append(result.cached_tokens)
    return {
        "cold_ms": statistics.median(cold_ms),
        "repeated_ms": statistics.median(repeated_ms),
        "cached_tokens": statistics.median(cached_tokens),
    }


def measure_memory(folder: Path) -> dict[str, Measurements]:
    """MLX's active bytes with a model, then with 64 adapters beside it; no prefixes are kept."""
    import gc

    adapters = adapter_folders(folder, NUM_ADAPTERS)
    files = sum((path / "adapters.safetensors").stat().st_size for path in adapters.values())
    loaded = engine.load_model(folder / "base")

    def active_bytes() -> float:
        import mlx.core as mx

        gc.collect()
        mx.clear_cache()
        return float(mx.get_active_memory())

    with _running(loaded, 16, prefix_memory_bytes=0) as running:
        base = engine.run_in_owner(active_bytes)
        for name, path in adapters.items():
            running.add_adapter(name, recognise(path))
        _answer(running, make_prompts("memory", NUM_ADAPTERS), list(adapters), max_tokens=8)
        with_adapters = engine.run_in_owner(active_bytes)
    memory = {"base_bytes": base, "files_bytes": float(files), "active_bytes": with_adapters}
    return {"memory": memory}


def measure_streams(folder: Path, seed: str, num_requests: int, rows: int) -> float:
    """Tokens per second of readers in this process, so many at a time as there are rows."""

    async def read_in_turn(running: engine.Engine, prompts: Iterator[Prompt]) -> None:
        for prompt in prompts:
            request = engine.GenerationRequest(prompt=prompt, max_tokens=NUM_TOKENS)
            count = 0
            async for event in running.submit(request).events():
                count += len(event.tokens)
            _check_lengths([range(count)], NUM_TOKENS)

    async def read_all(running: engine.Engine) -> None:
        prompts = iter(make_prompts(seed, num_requests))
        await asyncio.gather(*(read_in_turn(running, prompts) for _ in range(rows)))

    with _running(engine.load_model(folder / "base"), rows) as running:
        start_s = time.perf_counter()
        asyncio.run(read_all(running))
        return NUM_TOKENS * num_requests / (time.perf_counter() - start_s)


if __name__ == "__main__":
    if sys.argv[1] == "memory":
        print(json.dumps(measure_memory(Path(sys.argv[2]))))
    elif sys.argv[1] == "streams":
        print(measure_streams(Path(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:])))
    else:
        print(json.dumps(measure_throughput(Path(sys.argv[2]), sys.argv[3])))
