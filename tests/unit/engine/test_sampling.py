"""Drawing tokens: the filters, and a seed that means something."""

from __future__ import annotations

import pytest

from mlops.engine import Sampling, run_in_owner
from mlops.engine.sampling import keep_min_p, keep_top_k, keep_top_p, make_sampler
from mlops.hardware import ensure_blas

PROBABILITIES = [0.5, 0.25, 0.125, 0.0625, 0.0625]


def kept_by(name: str, limit: float) -> list[int]:
    ensure_blas()
    import mlx.core as mx

    keep = {"top_p": keep_top_p, "min_p": keep_min_p, "top_k": keep_top_k}[name]
    kept = keep(mx.log(mx.array([PROBABILITIES])), limit)  # type: ignore[operator]
    return [n for n, value in enumerate(kept[0].tolist()) if value > float("-inf")]


def draw(sampling: Sampling, num_draws: int) -> list[int]:
    import mlx.core as mx

    sampler = make_sampler(sampling)
    logprobs = mx.log(mx.array([PROBABILITIES]))
    return [int(sampler(logprobs).item()) for _ in range(num_draws)]


@pytest.mark.parametrize(
    ("name", "limit", "kept"),
    [
        ("top_p", 0.4, [0]),
        ("top_p", 0.5, [0]),
        ("top_p", 0.51, [0, 1]),
        ("top_p", 1e-9, [0]),
        ("top_k", 1, [0]),
        ("top_k", 3, [0, 1, 2]),
        ("min_p", 0.5, [0, 1]),
        ("min_p", 1.0, [0]),
    ],
)
def test_filters_keep_the_likely(name: str, limit: float, kept: list[int]) -> None:
    assert run_in_owner(kept_by, name, limit) == kept


def test_a_seed_repeats_and_another_differs() -> None:
    first = run_in_owner(draw, Sampling(temperature=1.0, seed=7), 64)
    assert run_in_owner(draw, Sampling(temperature=1.0, seed=7), 64) == first
    assert run_in_owner(draw, Sampling(temperature=1.0, seed=8), 64) != first
    assert run_in_owner(draw, Sampling(temperature=1.0), 64) != run_in_owner(
        draw, Sampling(temperature=1.0), 64
    )


def test_draws_follow_the_probabilities() -> None:
    draws = run_in_owner(draw, Sampling(temperature=1.0, seed=1), 2000)
    for token, probability in enumerate(PROBABILITIES):
        assert draws.count(token) / 2000 == pytest.approx(probability, abs=0.05)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=1e-30),
        Sampling(temperature=2.0, top_k=1),
        Sampling(temperature=2.0, top_p=0.01),
        Sampling(temperature=2.0, min_p=1.0),
    ],
)
def test_what_leaves_one_token_takes_the_most_likely(sampling: Sampling) -> None:
    assert run_in_owner(draw, sampling, 8) == [0] * 8


def test_more_top_k_than_tokens_keeps_all() -> None:
    assert set(run_in_owner(draw, Sampling(temperature=3.0, top_k=99, seed=0), 200)) == set(
        range(5)
    )
