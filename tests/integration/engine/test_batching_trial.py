"""The trial: a sample of the sweep over all architectures, and what rounding may do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

import batched_truth
import every_architecture
from mlops import engine
from mlops.engine import LoadedModel


@pytest.mark.parametrize(
    ("architecture", "verdict"),
    [
        ("nemotron_h", (True, False)),  # loses the state of a prompt that is padded
        ("jamba", (True, False)),
        ("afm7", (False, False)),  # positions of the longest row for all
        ("gemma2", (True, True)),  # needs a mask of its own shape
        ("gpt_oss", (True, True)),  # windows, and experts
        ("falcon_h1", (True, True)),  # state-space and attention
    ],
)
def test_the_verdict_is_true(
    loaded: LoadedModel, architecture: str, verdict: tuple[bool, bool]
) -> None:
    assert batched_truth.verdict_and_truth(loaded, architecture) == (verdict, verdict)


def test_a_window_that_is_cut_for_the_trial(loaded: LoadedModel) -> None:
    found = batched_truth.verdict_and_truth(loaded, "gemma3_text", sliding_window=40)
    assert found == ((True, True), (True, True))


def tried(change: Callable[[Any], None] | None = None, **settings: Any) -> Any:
    from mlops.engine.batching import try_out

    def run() -> Any:
        model = every_architecture.build(**settings)
        if change is not None:
            change(model)
        return try_out(model)

    return engine.run_in_owner(run)


def to_bfloat16(model: Any) -> None:
    import mlx.core as mx

    model.set_dtype(mx.bfloat16)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "mamba2"])
def test_rounding_of_bfloat16_is_no_reason_to_run_alone(architecture: str) -> None:
    assert tried(to_bfloat16, name=architecture).can_prefill_together


def test_what_is_wrong_in_bfloat16_shows_as_well() -> None:
    assert not tried(to_bfloat16, name="afm7").can_batch
    assert not tried(to_bfloat16, name="mamba").can_prefill_together


def test_it_says_what_failed_with_numbers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mlops.engine.batching"):
        tried(name="nemotron_h")
    (line,) = [record.getMessage() for record in caplog.records]
    assert "batching with prompts together gives something else in step 1" in line
    assert "of their standard deviation off, at most 0.001" in line


def test_nan_is_not_blamed_on_batching(caplog: pytest.LogCaptureFixture) -> None:
    import mlx.core as mx

    def break_norm(model: Any) -> None:
        model.model.norm.weight = mx.full(model.model.norm.weight.shape, mx.nan)

    with (
        caplog.at_level(logging.INFO, "mlops.engine.batching"),
        pytest.raises(ArithmeticError, match="logits are not finite"),
    ):
        tried(break_norm, name="llama")
    assert not caplog.records
