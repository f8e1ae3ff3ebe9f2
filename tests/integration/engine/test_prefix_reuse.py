"""What earlier requests computed is used again, changes no answer, and is shared by nobody else."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from engines import TIMEOUT_S, ask_all, mlx_lm_says, running, with_unfused_adapter
from mlops import engine
from mlops.checkpoints import recognise
from mlops.engine import Engine, GenerationRequest, GenerationResult, LoadedModel

ARCHITECTURES = {"llama": True, "gemma3_text": False, "lfm2": False, "mamba2": False}
"""Whether a state can be cut back to fewer tokens."""

MIB = 2**20
_source = random.Random(7)  # noqa: S311
PROMPT = tuple(_source.choices(range(1, 250), k=40))
OTHER = tuple(_source.choices(range(1, 250), k=40))


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedModel]:
    known: dict[str, LoadedModel] = {}

    def load_once(architecture: str) -> LoadedModel:
        if architecture not in known:
            folder = tmp_path_factory.mktemp(architecture)
            tiny_models.write_language_model(folder, architecture=architecture)
            known[architecture] = engine.load_model(folder)
        return known[architecture]

    return load_once


def ask(prompt: tuple[int, ...], max_tokens: int = 9, **fields: Any) -> GenerationRequest:
    return GenerationRequest(prompt, max_tokens=max_tokens, ignore_eos=True, **fields)


def answer(one: Engine, prompt: tuple[int, ...], **fields: Any) -> GenerationResult:
    """The answer, which is mlx-lm's whatever was cached."""
    (result,) = ask_all(one, ask(prompt, **fields))
    if result.tokens and "adapter" not in fields:
        expected = mlx_lm_says(one.loaded.model, one.loaded.tokenizer, ask(prompt, **fields))[1]
        assert result.tokens[: len(expected)] == expected
    return result


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_equal_prompt_is_not_computed_again(
    load: Callable[..., LoadedModel], architecture: str
) -> None:
    with running(load(architecture), prefix_memory_bytes=MIB) as one:
        first = answer(one, PROMPT)
        computed = one.statistics()["tokens"]["prefill"]
        for _ in range(2):
            again = answer(one, PROMPT)
            assert again.tokens == first.tokens
            assert (first.cached_tokens, again.cached_tokens) == (0, len(PROMPT) - 1)
        found = one.statistics()
        assert found["tokens"]["prefill"] == computed == len(PROMPT) - 1
        assert found["tokens"]["cached"] == 2 * (len(PROMPT) - 1)
        assert found["prefix_cache"]["hits"] == 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_conversation_goes_on_from_its_last_answer(
    load: Callable[..., LoadedModel], architecture: str
) -> None:
    with running(load(architecture), prefix_memory_bytes=MIB) as one:
        prompt, num_known = PROMPT, 0
        for turn in range(3):
            result = answer(one, prompt)
            assert result.cached_tokens == num_known
            # All but the last token that was drawn: that one has never been an input.
            num_known = len(prompt) + len(result.tokens) - 1
            prompt = prompt + result.tokens + (1, 2, 3 + turn)


@pytest.mark.parametrize(("architecture", "can_cut"), ARCHITECTURES.items())
def test_prompts_with_the_same_beginning(
    load: Callable[..., LoadedModel], architecture: str, can_cut: bool
) -> None:
    with running(load(architecture), prefix_memory_bytes=MIB) as one:
        answer(one, PROMPT)
        for length in (39, 25, 17):
            partly = answer(one, PROMPT[:length] + OTHER)
            expected = length if can_cut or length == len(PROMPT) - 1 else 0
            assert partly.cached_tokens == expected
        assert answer(one, OTHER[:5] + PROMPT).cached_tokens == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_further", [1, 2, 3, 20])
def test_what_is_cached_is_not_changed_by_those_who_use_it(
    load: Callable[..., LoadedModel], architecture: str, num_further: int
) -> None:
    with running(load(architecture), prefix_memory_bytes=MIB) as one:
        first = answer(one, PROMPT, max_tokens=20)
        known = PROMPT + first.tokens[:-1]
        for number in range(3):  # each goes on from the same state, in another way
            further = tuple(100 + 7 * number + n for n in range(num_further))
            result = answer(one, known + further + OTHER[:1], max_tokens=12)
            assert result.cached_tokens == len(known)
        together = ask_all(one, *[ask((*known, 100 + n, 5), max_tokens=12) for n in range(4)])
        for number, result in enumerate(together):
            alone = mlx_lm_says(
                one.loaded.model, one.loaded.tokenizer, ask((*known, 100 + number, 5), 12)
            )
            assert result.tokens[: len(alone[1])] == alone[1]


def test_an_answer_that_a_stop_ended_is_used_too(load: Callable[..., LoadedModel]) -> None:
    with running(load("llama"), prefix_memory_bytes=MIB) as one:
        whole = answer(one, PROMPT, max_tokens=20)
    with running(load("llama"), prefix_memory_bytes=MIB) as one:
        (result,) = ask_all(one, ask(PROMPT, 20, stop_token_ids=(whole.tokens[7],)))
        assert result.finish_reason == "stop"
        again = answer(one, PROMPT + whole.tokens[:8] + (1, 2))
        assert again.cached_tokens >= len(PROMPT) + len(result.tokens)


def test_a_cancelled_request_leaves_only_its_prompt(load: Callable[..., LoadedModel]) -> None:
    def test() -> None:
        generation = one.submit(ask(PROMPT, max_tokens=500))
        while one.statistics()["steps"]["decode"] < 5:
            one._guarded_step()
        generation.cancel()
        one._guarded_step()
        assert generation.result(0).finish_reason == "cancelled"

    with running(load("llama"), prefix_memory_bytes=MIB) as one:
        engine.run_in_owner(test)
        assert answer(one, PROMPT).cached_tokens == len(PROMPT) - 1


def test_off_and_too_small(load: Callable[..., LoadedModel]) -> None:
    one_prompt = load("llama").trial.cache_cost.num_bytes(len(PROMPT))
    for prefix_memory_bytes in (0, one_prompt // 2):
        with running(load("llama"), prefix_memory_bytes=prefix_memory_bytes) as one:
            assert [answer(one, PROMPT).cached_tokens for _ in range(3)] == [0, 0, 0]
            assert one.statistics()["prefix_cache"]["bytes"] == 0


def test_the_budget_is_kept_and_the_oldest_goes(load: Callable[..., LoadedModel]) -> None:
    loaded = load("llama")
    budget = 2 * loaded.trial.cache_cost.num_bytes(len(PROMPT) + 12)
    prompts = [tuple((n * 31 + at * 7) % 250 + 1 for at in range(40)) for n in range(4)]
    with running(loaded, prefix_memory_bytes=budget) as one:
        for prompt in prompts:
            answer(one, prompt)
            assert one.statistics()["prefix_cache"]["bytes"] <= budget
        assert answer(one, prompts[-1]).cached_tokens == len(PROMPT) - 1
        assert answer(one, prompts[0]).cached_tokens == 0


def test_salts_never_share(load: Callable[..., LoadedModel]) -> None:
    with running(load("llama"), prefix_memory_bytes=MIB) as one:
        answer(one, PROMPT, cache_salt="tenant one")
        for salt, cached in (("tenant two", 0), ("", 0), ("tenant one", len(PROMPT) - 1)):
            assert answer(one, PROMPT, cache_salt=salt).cached_tokens == cached


@pytest.mark.parametrize("num_slots", [1, 2])
def test_adapters_never_share_and_a_reload_begins_anew(
    load: Callable[..., LoadedModel], tmp_path: Path, num_slots: int
) -> None:
    loaded = load("llama")
    base = loaded.checkpoint.path
    paths = [
        tiny_models.write_lora_adapter(tmp_path / str(seed), base, seed=seed) for seed in (1, 2, 3)
    ]
    expected = [
        mlx_lm_says(with_unfused_adapter(base, path), loaded.tokenizer, ask(PROMPT))[1]
        for path in paths
    ]
    assert len(set(expected)) == 3

    def check(name: str, which: int, num_cached: int) -> None:
        result = answer(one, PROMPT, adapter=name)
        assert result.tokens[: len(expected[which])] == expected[which]
        assert result.cached_tokens == num_cached

    adapters = {"a": paths[0], "b": paths[1]}
    with running(loaded, adapters, prefix_memory_bytes=MIB, max_resident_adapters=num_slots) as one:
        known = len(PROMPT) - 1
        check("a", 0, 0)
        check("b", 1, 0)
        assert answer(one, PROMPT).cached_tokens == 0
        check("a", 0, known)  # also after it has been out of memory
        check("b", 1, known)
        one.add_adapter("a", recognise(paths[2]))
        check("a", 2, 0)
        check("a", 2, known)
        one.add_adapter("a", recognise(paths[0]))
        check("a", 0, 0)
        check("b", 1, known)
        # What belonged to adapters that are gone is gone.
        one.remove_adapter("a")
        one.remove_adapter("b")
        answer(one, OTHER)
        namespaces = {namespace[1] for namespace in one._prefix._roots}
        assert namespaces == {None} if num_slots == 2 else None in namespaces


def test_a_reload_while_a_request_runs(load: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """The old one finishes after the new one was registered, and leaves nothing for it."""
    loaded = load("llama")
    base = loaded.checkpoint.path
    old, new = (
        tiny_models.write_lora_adapter(tmp_path / str(seed), base, seed=seed) for seed in (1, 2)
    )
    expected = [
        mlx_lm_says(with_unfused_adapter(base, path), loaded.tokenizer, ask(PROMPT, 30))[1]
        for path in (old, new)
    ]

    def test() -> None:
        first = one.submit(ask(PROMPT, 30, adapter="a"))
        while one.statistics()["steps"]["decode"] < 5:
            one._guarded_step()
        one.add_adapter("a", recognise(new))
        second = one.submit(ask(PROMPT, 30, adapter="a"))
        results = [one.wait(first), one.wait(second)]
        for result, tokens in zip(results, expected, strict=True):
            assert result.tokens[: len(tokens)] == tokens
            assert result.cached_tokens == 0

    with running(loaded, {"a": old}, prefix_memory_bytes=MIB) as one:
        engine.run_in_owner(test)
        assert one.submit(ask(PROMPT, 30, adapter="a")).result(TIMEOUT_S).cached_tokens == 39
