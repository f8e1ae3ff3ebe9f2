"""Drawing: which tokens the filters leave, and how often each is drawn."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops.engine.drawing import Group, choose_way
from mlops.engine.request import Sampling
from mlops.engine.subset import Subset

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]
RAW_NUMBERS = 2**64
NUM_DRAWS = 400
FALLING = np.log([0.5, 0.25, 0.125, 0.0625, 0.0625])


class Uniform:
    """A source of random numbers that gives one number, from 0 up to but not 1."""

    def __init__(self, number: float) -> None:
        self.raw = min(int(number * RAW_NUMBERS), RAW_NUMBERS - 1)

    def random_raw(self) -> int:
        return self.raw


def draw(logits: Floats, sampling: Sampling, numbers: list[float]) -> list[int]:
    """One draw for each uniform number, all from the same logits."""
    way = choose_way(sampling, len(logits))
    assert way is not None
    group = Group(
        Subset(range(len(numbers)), len(numbers)),
        [sampling] * len(numbers),
        [Uniform(number) for number in numbers],  # type: ignore[misc]
        way.num_candidates,
        len(logits),
    )
    rows = mx.array(np.tile(logits.astype(np.float32), (len(numbers), 1)))
    tokens = group.draw(rows)
    assert tokens.dtype == mx.int32
    return list(map(int, tokens.tolist()))


def shares_of(logits: Floats, sampling: Sampling) -> Floats:
    """How often each token is drawn, by a sweep over the uniform numbers."""
    numbers = [(i + 0.5) / NUM_DRAWS for i in range(NUM_DRAWS)]
    tokens = draw(logits, sampling, numbers)
    return np.bincount(tokens, minlength=len(logits)) / NUM_DRAWS


def reference(logits: Floats, sampling: Sampling) -> Floats:
    """The probabilities, after the filters, in plain numpy."""
    p = np.exp((logits - logits.max()) / sampling.temperature)
    p[p < sampling.min_p] = 0
    order = np.argsort(-p, kind="stable")
    if 0 < sampling.top_k < len(p):
        p[order[sampling.top_k :]] = 0
    mass_before = np.cumsum(p[order]) - p[order]
    p[order[mass_before >= sampling.top_p * p.sum()]] = 0
    return np.asarray(p / p.sum())


def some_logits(size: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(0, 2.5, size)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1),
        Sampling(temperature=0.6),
        Sampling(temperature=3),
        Sampling(temperature=1, top_p=0.7),
        Sampling(temperature=2, top_p=0.95),
        Sampling(temperature=1, top_p=1e-30),
        Sampling(temperature=1, min_p=0.1),
        Sampling(temperature=1, min_p=1),
        Sampling(temperature=1, top_k=2),
        Sampling(temperature=1, top_k=64),
        Sampling(temperature=2, top_k=500),
        Sampling(temperature=2, top_k=1500),
        Sampling(temperature=2, top_k=10**30),
        Sampling(temperature=1, top_k=7, top_p=0.8, min_p=0.02),
        Sampling(temperature=1.5, top_k=1500, top_p=0.8, min_p=0.001),
        Sampling(temperature=1.5, top_p=0.8, min_p=0.05),
    ],
    ids=repr,
)
def test_tokens_are_drawn_as_often_as_is_right(sampling: Sampling) -> None:
    logits = some_logits(2000)
    logits[:6] = [11, 10.5, 10.1, 9.7, 9.2, 8.6]
    # A sweep meets every interval of the cumulative sum to within one step at each end.
    difference = np.abs(shares_of(logits, sampling) - reference(logits, sampling))
    assert difference.max() <= 1.01 / NUM_DRAWS


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(temperature=1, top_p=0.4), {0}),
        (Sampling(temperature=1, top_p=0.499), {0}),
        (Sampling(temperature=1, top_p=0.51), {0, 1}),
        (Sampling(temperature=1, top_p=0.76), {0, 1, 2}),
        (Sampling(temperature=1, top_k=3), {0, 1, 2}),
        (Sampling(temperature=1, top_k=9), {0, 1, 2, 3, 4}),
        (Sampling(temperature=1, min_p=0.49), {0, 1}),
        (Sampling(temperature=1, min_p=1), {0}),
        # Each filter sees what the one before it left: half of 0.75 is reached by token 0 alone.
        (Sampling(temperature=1, top_k=2, top_p=0.66), {0}),
        (Sampling(temperature=1, min_p=0.49, top_p=0.66), {0}),
        # Temperature comes first: it makes 0.5 and 0.25 to 0.8 and 0.2.
        (Sampling(temperature=0.5, top_k=2, top_p=0.79), {0}),
    ],
    ids=repr,
)
def test_filters_keep_the_likely(sampling: Sampling, kept: set[int]) -> None:
    assert set(np.flatnonzero(shares_of(FALLING, sampling))) == kept


filtering = st.builds(
    Sampling,
    temperature=st.floats(0.05, 5),
    top_p=st.floats(1e-3, 1) | st.just(1.0) | st.just(0.999999),
    top_k=st.sampled_from([0, 2, 40, 64, 65, 700, 1100]),
    min_p=st.floats(0, 0.3) | st.just(0.0),
)


@given(
    filtering,
    st.sampled_from([3, 64, 65, 1500]),
    st.integers(0, 2**32 - 1),
    st.lists(st.floats(0, 1), max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_a_filtered_token_is_never_drawn(
    sampling: Sampling, size: int, seed: int, numbers: list[float]
) -> None:
    logits = some_logits(size, seed).round(1)  # many are equally likely, as in bfloat16
    logits[-size // 2 :] = -np.inf
    expected = reference(logits, sampling)
    # Tokens as likely as the least likely one of the reference may be drawn as well.
    least = np.log(expected[expected > 0].min())
    for token in draw(logits, sampling, [0.0, 1.0, 1 - 2**-24, *numbers]):
        assert logits[token] > -np.inf
        likely = (
            np.log(expected[np.argmax(logits)])
            + (logits[token] - logits.max()) / sampling.temperature
        )
        assert likely >= least - 0.003


def test_the_end_of_a_long_sum_stays_within_the_tokens() -> None:
    """In float32, a sum over so many tokens would end far from 1, and before the last of them."""
    logits = np.zeros(150_000)
    logits[0] = 12.0
    sampling = Sampling(temperature=1)
    first, middle, last = draw(logits, sampling, [0.0, 0.8, 1.0])
    assert (first, last) == (0, len(logits) - 1)
    head = np.exp(12.0)
    place = 0.8 * (head + len(logits) - 1) - head
    assert middle == pytest.approx(place, rel=1e-3)


def test_numbers_follow_the_probabilities() -> None:
    generators = [np.random.PCG64(seed) for seed in range(4000)]
    logits = some_logits(40)
    sampling = Sampling(temperature=1)
    group = Group(Subset(range(4000), 4000), [sampling] * 4000, generators, None, 40)
    tokens = group.draw(mx.array(np.tile(logits.astype(np.float32), (4000, 1))))
    expected = reference(logits, sampling) * 4000
    seen = np.bincount(np.array(tokens), minlength=40)
    common = expected >= 5
    chi_square = ((seen - expected) ** 2 / expected)[common].sum()
    freedom = common.sum() - 1
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)
