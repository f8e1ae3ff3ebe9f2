"""The sampler of a batch: every row as if it were alone, with adjustments, seeds and logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops.engine.request import GenerationRequest, Sampling
from mlops.engine.sampling import BatchSampler, Draw
from mlops.engine.subset import Subset

Array = np.ndarray[Any, np.dtype[Any]]
SIZE = 1300  # more than the most candidates
NUM_STEPS = 3


def request(
    sampling: Sampling | None = None, *, prompt: Sequence[int] = (1,), logprobs: int | None = None
) -> GenerationRequest:
    return GenerationRequest(tuple(prompt), sampling=sampling or Sampling(), logprobs=logprobs)


def make_logits(num_rows: int, seed: int = 0, size: int = SIZE) -> Array:
    """Logits for some steps, (steps, rows, size); many are equal, as in bfloat16."""
    generator = np.random.default_rng(seed)
    return generator.normal(0, 2, (NUM_STEPS, num_rows, size)).round(1).astype(np.float32)


def run(rows: Sequence[GenerationRequest], logits: Array) -> list[Draw]:
    """Draw step after step; nothing is computed before the end."""
    sampler = BatchSampler(logits.shape[-1])
    sampler.add(rows)
    draws = [sampler(mx.array(step)) for step in logits]
    mx.eval([draw.tokens for draw in draws])
    return draws


def tokens_of(rows: Sequence[GenerationRequest], logits: Array) -> list[list[int]]:
    """Each row's tokens."""
    steps = [draw.tokens.tolist() for draw in run(rows, logits)]
    return [list(row) for row in zip(*steps, strict=True)]


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-30, 0.3, 1.0, 2.0, 10.0]),
    top_p=st.sampled_from([1.0, 0.99, 0.9, 0.3, 1e-12]),
    top_k=st.sampled_from([0, 0, 1, 2, 50, 100, 1100, 10**30]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 1.0]),
    seed=st.integers(0, 2**63 - 1),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.5, 1e-300, 10.0]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5, -2.0]),
    logit_bias=st.sampled_from([(), (), ((3, 100.0),), ((4, -100.0), (SIZE, 5.0), (2**31 - 1, 1))]),
)
requests = st.builds(
    request,
    samplings,
    prompt=st.lists(st.sampled_from([0, 3, 700, SIZE - 1, SIZE, 2**31 - 1]), min_size=1),
    logprobs=st.sampled_from([None, None, 0, 1, 20]),
)


@given(st.lists(requests, min_size=2, max_size=6), st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_a_row_gets_what_it_would_get_alone(rows: list[GenerationRequest], seed: int) -> None:
    logits = make_logits(len(rows), seed)
    together = run(rows, logits)
    for number, row in enumerate(rows):
        alone = run([row], logits[:, number : number + 1])
        for draw, own in zip(together, alone, strict=True):
            assert draw.tokens[number].item() == own.tokens[0].item()
            if row.logprobs is not None:
                assert draw.logprobs is not None
                assert own.logprobs is not None
                num = row.logprobs
                assert draw.logprobs.chosen[number].item() == own.logprobs.chosen[0].item()
                assert (
                    draw.logprobs.top_ids[number, :num].tolist() == own.logprobs.top_ids[0].tolist()
                )


@given(st.lists(requests, min_size=3, max_size=5), st.data())
@settings(max_examples=40, deadline=None)
def test_rows_come_go_and_change_places(rows: list[GenerationRequest], data: st.DataObject) -> None:
    logits = make_logits(len(rows))
    expected = [tokens_of([row], logits[:, n : n + 1])[0] for n, row in enumerate(rows)]

    sampler = BatchSampler(SIZE)
    present: list[int] = []
    waiting = list(range(len(rows)))
    drawn: list[list[int]] = [[] for _ in rows]
    while present or waiting:
        joining = data.draw(st.integers(0 if present else 1, len(waiting))) if waiting else 0
        sampler.add([rows[n] for n in waiting[:joining]])
        present += waiting[:joining]
        waiting = waiting[joining:]
        step = np.stack([logits[len(drawn[n]), n] for n in present])
        for n, token in zip(present, sampler(mx.array(step)).tokens.tolist(), strict=True):
            drawn[n].append(token)
        going_on = [place for place, n in enumerate(present) if len(drawn[n]) < NUM_STEPS]
        order = data.draw(st.permutations(going_on))
        sampler.keep(order)
        present = [present[place] for place in order]
    assert drawn == expected


def adjusted(logits: Array, sampling: Sampling, prompt: Sequence[int], answer: list[int]) -> Array:
    """Bias and penalties in plain numpy, token by token."""
    logits = logits.astype(np.float64).copy()
    for token, value in sampling.logit_bias:
        logits[token] += value
    for token in {*prompt, *answer}:
        if logits[token] > 0:
            logits[token] /= sampling.repetition_penalty
        else:
            logits[token] *= sampling.repetition_penalty
    for token in set(answer):
        logits[token] -= sampling.presence_penalty
        logits[token] -= sampling.frequency_penalty * answer.count(token)
    return logits


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(repetition_penalty=1.3),
        Sampling(repetition_penalty=0.7),
        Sampling(presence_penalty=0.8),
        Sampling(frequency_penalty=0.4),
        Sampling(frequency_penalty=-0.5, presence_penalty=0.9),
        Sampling(logit_bias=((2, -3.0), (5, 4.0))),
        Sampling(0.0, 1, 0, 0, None, 1.2, 0.3, 0.2, ((1, 1.5), (2, -0.5))),
    ],
    ids=repr,
)
def test_bias_and_penalties_are_the_formulas(sampling: Sampling) -> None:
    prompt = (2, 2, 3)
    logits = np.array([1.9, 1.3, 2.0, -0.4, 1.05, 0.6])
    steps = np.tile(logits.astype(np.float32), (12, 2, 1))
    steps[:, 0] -= 3 * (np.arange(12)[:, None] % 3 == 2)  # below 0, too
    answer: list[int] = []
    for step in steps[:, 0]:
        answer.append(int(np.argmax(adjusted(step, sampling, prompt, answer))))
    rows = [request(sampling, prompt=prompt), request()]
    assert tokens_of(rows, steps) == [answer, [2] * 12]


def test_a_plain_batch_is_one_argmax_and_keeps_the_logits() -> None:
    logits = mx.array(make_logits(3)[0]).astype(mx.bfloat16)
    sampler = BatchSampler(SIZE)
    sampler.add([request() for _ in range(3)])
    draw = sampler(logits)
    assert draw.logprobs is None
    assert draw.tokens.dtype == mx.int32
    assert draw.tokens.tolist() == mx.argmax(logits, axis=-1).tolist()
    sampler.add([request(Sampling(repetition_penalty=9.0, logit_bias=((0, 9.0),)))])
    logits = mx.concatenate([logits, logits[:1]])
    before = np.array(logits.astype(mx.float32))
    mx.eval(sampler(logits).tokens)
    assert np.array_equal(np.array(logits.astype(mx.float32)), before)


def test_a_subset_leaves_the_array_it_was_given() -> None:
    values = mx.zeros((3,))
    assert Subset([0, 2], 3).put(values, mx.array([1.0, 2.0])).tolist() == [1, 0, 2]
    assert values.tolist() == [0, 0, 0]


def test_a_seed_repeats_and_another_differs() -> None:
    logits = np.zeros((8, 1, SIZE), dtype=np.float32)
    first = tokens_of([request(Sampling(1.0, seed=7))], logits)
    assert tokens_of([request(Sampling(1.0, seed=7))], logits) == first
    assert tokens_of([request(Sampling(1.0, seed=8))], logits) != first
    unseeded = request(Sampling(1.0))
    assert tokens_of([unseeded], logits) != tokens_of([unseeded], logits)
    assert len(set(first[0])) > 1


def test_logprobs_are_the_models_own() -> None:
    logits = make_logits(4)
    logits[:, :, 7] = 9.0
    rows = [
        request(Sampling(2.0, top_k=3, logit_bias=((9, 50.0),), seed=1), logprobs=3),
        request(),
        request(logprobs=0),
        request(Sampling(1.0, seed=2), logprobs=5),
    ]
    for step, draw in zip(logits.astype(np.float64), run(rows, logits), strict=True):
        expected = step - np.log(np.exp(step).sum(axis=-1, keepdims=True))
        found = draw.logprobs
        assert found is not None
        assert found.top_ids.shape == found.top_logprobs.shape == (4, 5)
        for n in (0, 2, 3):
            token = draw.tokens[n].item()
            assert found.chosen[n].item() == pytest.approx(expected[n, token], abs=1e-4)
        assert draw.tokens[0].item() == 9
        for n in (0, 3):
            top = -np.sort(-expected[n])[:5]
            assert np.allclose(np.array(found.top_logprobs[n]), top, atol=1e-4)
            ids = found.top_ids[n].tolist()
            assert ids[0] == 7
            assert np.allclose(expected[n, ids], top, atol=1e-4)
        assert found.chosen[1].item() == 0


def test_more_logprobs_than_tokens_gives_all() -> None:
    logits = np.array([[[1.0, 3.0, 2.0]]], dtype=np.float32)
    (draw,) = run([request(logprobs=20)], logits)
    assert draw.logprobs is not None
    assert draw.logprobs.top_ids.tolist() == [[1, 2, 0]]


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("num_broken", [1, SIZE])
def test_broken_logits_give_a_token_and_harm_no_neighbour(broken: float, num_broken: int) -> None:
    ways = [
        Sampling(),
        Sampling(1.0, seed=1),
        Sampling(1.0, top_p=0.9, seed=1),
        Sampling(1.0, top_k=5, top_p=0.9, seed=1),
        Sampling(1.0, top_k=100, min_p=0.1, seed=1),
        Sampling(1.0, top_k=1100, seed=1),
        Sampling(0.0, repetition_penalty=1.5, frequency_penalty=1.0),
    ]
    rows = [request(way, logprobs=2) for way in ways for _ in range(2)]
    logits = make_logits(len(rows))
    healthy = tokens_of(rows, logits)
    logits[:, ::2, -num_broken:] = broken
    tokens = tokens_of(rows, logits)
    assert tokens[1::2] == healthy[1::2]
    assert all(0 <= token < SIZE for row in tokens for token in row)
