"""Generation beside mlx-lm's own, on tiny random models: same tokens, whoever shares the batch."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from engines import TIMEOUT_S, ask_all, mlx_lm_says, running, tokens_of
from mlops import engine
from mlops.engine import GenerationRequest, LoadedModel, Sampling

PROMPTS = ["Hello", "a", "The quick brown fox jumps over the lazy dog", "café 🍏 naïve", "1 2 3"]
ARCHITECTURES = [
    *("llama", "qwen3", "phi3", "gpt2"),
    *("mixtral", "qwen3_moe"),
    "gemma3_text",  # windows of 8 tokens
    *("mamba2", "lfm2", "qwen3_next"),  # state-space, and hybrids
    "gemma2",  # takes masks of another shape
]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LoadedModel]:
    """Writes and loads a model; the same arguments give the same one again."""
    known: dict[str, LoadedModel] = {}

    def load_once(**arguments: Any) -> LoadedModel:
        key = repr(sorted(arguments.items()))
        if key not in known:
            folder = tiny_models.write_language_model(tmp_path_factory.mktemp("model"), **arguments)
            known[key] = engine.load_model(folder)
        return known[key]

    return load_once


def ask(loaded: LoadedModel, text: str = "Hello", **fields: Any) -> GenerationRequest:
    return GenerationRequest(tuple(loaded.tokenizer.encode(text)), **{"max_tokens": 24, **fields})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_mlx_lm_alone_and_in_a_batch(
    load: Callable[..., LoadedModel], architecture: str
) -> None:
    loaded = load(architecture=architecture)
    assert loaded.can_batch
    requests = [ask(loaded, text, max_tokens=5 + 6 * n) for n, text in enumerate(PROMPTS)]
    expected = [mlx_lm_says(loaded.model, loaded.tokenizer, request) for request in requests]
    with running(loaded) as one:
        together = ask_all(one, *requests)
        alone = [ask_all(one, request)[0] for request in requests]
    for results in (together, alone):
        assert [(r.text, r.tokens, r.finish_reason) for r in results] == expected


@pytest.mark.parametrize("prefix_memory_bytes", [0, 2**24])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_requests_join_and_leave_in_mid_stream(
    load: Callable[..., LoadedModel], architecture: str, prefix_memory_bytes: int
) -> None:
    loaded = load(architecture=architecture)
    source = random.Random(1)  # noqa: S311
    prompts = [
        tuple(source.choices(range(1, 250), k=length)) for length in (1, 60, 2, 17, 33, 5, 21, 40)
    ]
    prompts += [prompts[4], prompts[4] + prompts[0], prompts[1][:30] + prompts[2], prompts[0]]
    requests = [GenerationRequest(p, max_tokens=source.randint(1, 30)) for p in prompts]
    expected = [mlx_lm_says(loaded.model, loaded.tokenizer, one)[1] for one in requests]
    with running(
        loaded, max_rows=4, prefill_tokens=24, prefix_memory_bytes=prefix_memory_bytes
    ) as one:
        generations = []
        for number, request in enumerate(requests):
            generations.append(one.submit(request))
            if number % 3 == 2:  # the next ones come when some rows have gone
                generations[-3].result(TIMEOUT_S)
        found = [generation.result(TIMEOUT_S).tokens for generation in generations]
        sizes = one.statistics()["batch_sizes"]
    assert found == expected
    assert len(sizes) > 1


def test_long_prompts_are_computed_in_chunks(load: Callable[..., LoadedModel]) -> None:
    loaded = load()
    requests = [ask(loaded, "long " * 40), ask(loaded, "short"), ask(loaded, "long " * 30)]
    expected = [mlx_lm_says(loaded.model, loaded.tokenizer, one)[1] for one in requests]
    with running(loaded, prefill_tokens=16) as one:
        assert tokens_of(one, *requests) == expected
        assert one.statistics()["steps"]["prefill"] >= len("long " * 70) / 16


def test_a_running_stream_goes_on_while_a_long_prompt_is_computed(
    load: Callable[..., LoadedModel],
) -> None:
    loaded = load()
    with running(loaded, prefill_tokens=16, prefix_memory_bytes=0) as one:
        stream = one.submit(ask(loaded, max_tokens=900))
        late = one.submit(ask(loaded, "long " * 80, max_tokens=1))
        late.result(TIMEOUT_S)
        steps = one.statistics()["steps"]
        stream.cancel()
        # One decode step for each chunk of the prompt, not one after all of them.
        assert steps["decode"] >= steps["prefill"] - 2 >= 400 / 16 - 2


def test_usage_and_times(load: Callable[..., LoadedModel]) -> None:
    loaded = load()
    with running(loaded) as one:
        (result,) = ask_all(one, ask(loaded, max_tokens=8))
    assert result.prompt_tokens == len("Hello")
    assert (result.completion_tokens, result.finish_reason) == (8, "length")
    assert 0 < result.queue_ms <= result.first_token_ms <= result.total_ms


def test_a_seed_gives_the_same_text_whatever_else_runs(load: Callable[..., LoadedModel]) -> None:
    loaded = load()

    def seeded(seed: int) -> GenerationRequest:
        return ask(loaded, "Hi", sampling=Sampling(1.0, top_p=0.95, top_k=200, seed=seed))

    with running(loaded) as one:
        (alone,) = ask_all(one, seeded(1))
        others = [ask(loaded, text, sampling=Sampling(temperature=1.5)) for text in PROMPTS]
        crowded = ask_all(one, others[0], seeded(1), *others[1:], seeded(2), ask(loaded, "Hi"))
        assert crowded[1].tokens == alone.tokens
        assert crowded[-2].tokens != alone.tokens
        assert crowded[-1].tokens == tokens_of(one, ask(loaded, "Hi"))[0]


def test_a_stop_text_ends_and_is_cut(load: Callable[..., LoadedModel]) -> None:
    loaded = load()
    with running(loaded) as one:
        (whole,) = ask_all(one, ask(loaded, max_tokens=40))
        stop = whole.text[5:8]
        at = whole.text.index(stop)
        stopping = ask(loaded, max_tokens=40, stop=("never to be seen", stop))
        for results in (ask_all(one, stopping), ask_all(one, stopping, ask(loaded, "other"))):
            assert (results[0].text, results[0].finish_reason) == (whole.text[:at], "stop")
            assert results[0].completion_tokens < 40


def test_a_stop_token_ends(load: Callable[..., LoadedModel]) -> None:
    loaded = load()
    with running(loaded) as one:
        (whole,) = ask_all(one, ask(loaded, max_tokens=20))
        token = whole.tokens[6]
        (result,) = ask_all(one, ask(loaded, max_tokens=20, stop_token_ids=(token,)))
    assert result.tokens == whole.tokens[: whole.tokens.index(token)]
    assert result.finish_reason == "stop"


def test_the_end_token_ends_unless_it_is_to_be_ignored(load: Callable[..., LoadedModel]) -> None:
    loaded = load()
    (end,) = loaded.tokenizer.eos_token_ids
    to_end = Sampling(logit_bias=((end, 100.0),))
    with running(loaded) as one:
        ended, ignored = ask_all(
            one,
            ask(loaded, max_tokens=5, sampling=to_end),
            ask(loaded, max_tokens=5, sampling=to_end, ignore_eos=True),
        )
    assert (ended.tokens, ended.text, ended.finish_reason) == ((), "", "stop")
    assert (ignored.tokens, ignored.finish_reason) == ((end,) * 5, "length")


def test_log_probabilities_of_those_who_ask(load: Callable[..., LoadedModel]) -> None:
    import mlx.core as mx
    import numpy as np

    loaded = load()
    with running(loaded) as one:
        asked, other = ask_all(
            one, ask(loaded, max_tokens=6, logprobs=3), ask(loaded, "other", max_tokens=9)
        )
    assert other.logprobs == ()
    assert tuple(entry.token for entry in asked.logprobs) == asked.tokens

    def expected() -> Any:
        ids = [*loaded.tokenizer.encode("Hello"), *asked.tokens]
        logits = loaded.model(mx.array([ids]))[0, -7:-1]
        return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    table = engine.run_in_owner(expected)
    for entry, row in zip(asked.logprobs, table, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token], abs=1e-4)
        likeliest = np.argsort(-row)[:3]
        assert [token for token, _ in entry.top] == likeliest.tolist()
        assert [value for _, value in entry.top] == pytest.approx(row[likeliest], abs=1e-4)


def test_a_quantized_model_that_stays_as_stored(tmp_path: Path) -> None:
    folder = tiny_models.write_language_model(tmp_path, quantize_bits=4)
    loaded = engine.load_model(folder, memory_budget_bytes=0)
    assert loaded.layout == "4-bit (as stored)"
    requests = [ask(loaded, text) for text in PROMPTS]
    expected = [mlx_lm_says(loaded.model, loaded.tokenizer, one)[1] for one in requests]
    with running(loaded) as one:
        assert tokens_of(one, *requests) == expected


def test_an_answer_longer_than_the_first_rectangle(load: Callable[..., LoadedModel]) -> None:
    loaded = load()
    requests = [ask(loaded, "a", max_tokens=700), ask(loaded, "x" * 300, max_tokens=400)]
    expected = [mlx_lm_says(loaded.model, loaded.tokenizer, one)[1] for one in requests]
    with running(loaded) as one:
        first = one.submit(requests[0])
        while one.statistics()["steps"]["decode"] < 40:
            time.sleep(0.001)
        # Longer than all columns that there are: everything moves to the right for it.
        second = one.submit(requests[1])
        assert [first.result(TIMEOUT_S).tokens, second.result(TIMEOUT_S).tokens] == expected
