"""Streams beside results, and requests that come, join, leave and are given up at random."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny_models
from engines import TIMEOUT_S, running, tokens_of
from mlops import engine
from mlops.engine import (
    Engine,
    Generation,
    GenerationEvent,
    GenerationRequest,
    GenerationResult,
    LoadedModel,
    Sampling,
)
from mlops.errors import EngineShutdownError


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: tiny_models.write_lora_adapter(tmp_path_factory.mktemp(name), base, seed=seed)
        for seed, name in enumerate("ab", 1)
    }


def ask(text: str = "Hello", **fields: Any) -> GenerationRequest:
    return GenerationRequest(tuple(text.encode()), **{"max_tokens": 30, **fields})


async def read(generation: Generation, num_turns_between: int = 0) -> list[GenerationEvent]:
    seen = []
    async for event in generation.events():
        seen.append(event)
        for _ in range(num_turns_between):  # others go first: a reader who falls behind
            await asyncio.sleep(0)
    return seen


def check_stream(events: list[GenerationEvent], alone: GenerationResult) -> None:
    """The events, put together, are the result; the last one brings it."""
    last = events[-1].result
    assert last is not None
    assert (last.text, last.tokens, last.finish_reason) == (
        alone.text,
        alone.tokens,
        alone.finish_reason,
    )
    assert "".join(event.text for event in events) == alone.text
    assert tuple(token for event in events for token in event.tokens) == alone.tokens
    logprobs = tuple(one for event in events for one in event.logprobs)
    assert logprobs == last.logprobs
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish_reason == alone.finish_reason


def test_fifty_streams_at_once(loaded: LoadedModel, adapters: dict[str, Path]) -> None:
    requests = [
        ask(
            f"number {number}",
            adapter=[None, "a", "b"][number % 3],
            max_tokens=1 + number % 40,
            stop=("e", "\u00e9") if number % 5 == 0 else (),
            logprobs=2 if number % 4 == 0 else None,
        )
        for number in range(50)
    ]

    async def stream_all(one: Engine) -> list[list[GenerationEvent]]:
        generations = [one.submit(request) for request in requests]
        return await asyncio.gather(
            *[read(generation, 50 * (n % 2)) for n, generation in enumerate(generations)]
        )

    with running(loaded, adapters, max_rows=8) as one:
        expected = [one.submit(request).result(TIMEOUT_S) for request in requests]
        streams = asyncio.run(stream_all(one))
    for events, alone in zip(streams, expected, strict=True):
        check_stream(events, alone)


def test_text_comes_while_it_is_generated(loaded: LoadedModel) -> None:
    async def test(one: Engine) -> None:
        generation = one.submit(ask(max_tokens=2000))
        events = generation.events()
        first = await anext(events)
        assert not generation.future.done()
        assert 0 < len(first.tokens) < 2000
        await events.aclose()  # the client is gone
        result = await asyncio.wait_for(asyncio.wrap_future(generation.future), TIMEOUT_S)
        assert result.finish_reason == "cancelled"

    with running(loaded, cache_memory_bytes=2**24) as one:
        asyncio.run(test(one))


def test_a_stream_is_told_that_the_engine_closes(loaded: LoadedModel) -> None:
    async def test(one: Engine) -> int:
        num_tokens = 0
        generation = one.submit(ask(max_tokens=2000))
        with pytest.raises(EngineShutdownError):
            async for event in generation.events():
                num_tokens += len(event.tokens)
                if num_tokens > 3:
                    await asyncio.to_thread(one.close)
        return num_tokens

    with running(loaded, cache_memory_bytes=2**24) as one:
        assert 3 < asyncio.run(test(one)) < 2000


requests = st.builds(
    lambda text, max_tokens, adapter, seed, stop, salt: ask(
        text,
        max_tokens=max_tokens,
        adapter=adapter,
        sampling=Sampling() if seed is None else Sampling(1.0, top_p=0.9, seed=seed),
        stop=stop,
        cache_salt=salt,
    ),
    text=st.text("abc ", min_size=1, max_size=60),
    max_tokens=st.integers(1, 24),
    adapter=st.sampled_from([None, "a", "b"]),
    seed=st.none() | st.integers(0, 3),
    stop=st.sampled_from([(), ("e",), ("an", "\n")]),
    salt=st.sampled_from(["", "other"]),
)
plans = st.lists(st.tuples(requests, st.integers(0, 4), st.none() | st.integers(0, 12)), max_size=9)
"""Each request, steps before the next one comes, and steps after which it is given up."""


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    plan=plans,
    limits=st.sampled_from(
        [
            {"max_rows": 3, "prefill_tokens": 8},
            {"max_rows": 1, "prefix_memory_bytes": 0},
            {"max_resident_adapters": 1, "prefill_tokens": 40},
        ]
    ),
    random_seed=st.integers(0, 2**16),
)
def test_whatever_comes_every_request_ends_once_with_what_it_gives_alone(
    loaded: LoadedModel,
    adapters: dict[str, Path],
    plan: list[tuple[GenerationRequest, int, int | None]],
    limits: dict[str, Any],
    random_seed: int,
) -> None:
    with running(loaded, adapters) as one:
        alone = [tokens_of(one, request)[0] for request, _, _ in plan]

    with running(loaded, adapters, **limits) as one:
        results = engine.run_in_owner(carry_out, one, plan)
        check_against(results, alone, [at for _, _, at in plan])
        order = list(range(len(plan)))
        random.Random(random_seed).shuffle(order)  # noqa: S311
        shuffled = [one.submit(plan[number][0]) for number in order]
        for number, generation in zip(order, shuffled, strict=True):
            assert generation.result(TIMEOUT_S).tokens == alone[number]


def carry_out(
    one: Engine, plan: list[tuple[GenerationRequest, int, int | None]]
) -> list[GenerationResult]:
    """Step by step, in the owner thread; gives the results and counts their ends."""
    under_way: list[tuple[Generation, int | None]] = []
    ends: list[Generation] = []
    now = 0

    def step() -> None:
        nonlocal now
        for generation, end in under_way:
            if end is not None and now >= end:
                generation.cancel()
        one._guarded_step()
        now += 1
        assert one.statistics()["running"] <= one.max_rows
        one.adapters.check()

    for request, num_steps, given_up_after in plan:
        generation = one.submit(request)
        add_end: Callable[[Any], None] = lambda _, g=generation: ends.append(g)  # noqa: E731
        generation.future.add_done_callback(add_end)
        under_way.append((generation, None if given_up_after is None else now + given_up_after))
        for _ in range(num_steps):
            step()
    while not all(generation.future.done() for generation, _ in under_way):
        step()
    assert sorted(map(id, ends)) == sorted(id(generation) for generation, _ in under_way)
    return [generation.result(0) for generation, _ in under_way]


def check_against(
    results: list[GenerationResult],
    alone: list[tuple[int, ...]],
    given_up_after: list[int | None],
) -> None:
    for result, tokens, end in zip(results, alone, given_up_after, strict=True):
        if result.finish_reason == "cancelled":
            assert end is not None
            assert result.tokens == tokens[: len(result.tokens)]
        else:
            assert result.tokens == tokens
