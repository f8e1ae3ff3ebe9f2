"""Who goes next: fair between adapters, in order within one, and prompts in shares of a budget."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops.checkpoints import Checkpoint, CheckpointKind
from mlops.engine.request import GenerationRequest
from mlops.engine.residency import Adapter
from mlops.engine.scheduler import Admission, Scheduler, share_prefill
from mlops.engine.sequence import Generation, Sequence
from mlops.errors import QueueFullError

CHECKPOINT = Checkpoint(
    path=Path("/nowhere"),
    kind=CheckpointKind.ADAPTER,
    format="mlx-lm adapter",
    framework="mlx",
    description="a LoRA adapter",
    weight_files=(),
    weight_bytes=0,
)
TEXT: Any = None  # no text is made here
_clock = itertools.count()


def waiting_for(name: str | None, num_prompt_tokens: int = 4) -> Sequence:
    """A request for an adapter, younger than all before; None is the base."""
    return Sequence(
        GenerationRequest((1,) * num_prompt_tokens, max_tokens=1),
        Generation(),
        None if name is None else Adapter(name, 1, CHECKPOINT, None, 1),
        TEXT,
        frozenset(),
        submitted_s=float(next(_clock)),
    )


def queue_of(*names: str | None) -> Scheduler:
    scheduler = Scheduler(max_waiting=10_000)
    for name in names:
        scheduler.add(waiting_for(name))
    return scheduler


def admit_all(_: Sequence) -> Admission:
    return Admission.YES


def names_of(sequences: list[Sequence]) -> list[str | None]:
    return [sequence.adapter_name for sequence in sequences]


@given(
    queued=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    max_rows=st.integers(1, 8),
)
def test_rows_that_are_filled_at_once_differ_by_one_at_most(
    queued: list[int], max_rows: int
) -> None:
    names = [f"a{number}" for number, count in enumerate(queued) for _ in range(count)]
    scheduler = queue_of(*names)
    admitted = scheduler.admit([], max_rows, admit_all)
    assert len(admitted) == min(max_rows, len(names))
    rows = Counter(names_of(admitted))
    left = Counter(names_of(scheduler.waiting))
    for name in left:  # who still waits has no fewer rows than anybody else, but for one
        assert rows[name] >= max(rows.values()) - 1


@given(
    num_adapters=st.integers(2, 6),
    num_queued=st.integers(3, 12),
    max_rows=st.integers(1, 4),
    data=st.data(),
)
def test_of_k_adapters_in_a_row_of_k_admissions_each_gets_one(
    num_adapters: int, num_queued: int, max_rows: int, data: st.DataObject
) -> None:
    """Rows end at once: the busiest possible engine. Whoever submitted first wins nothing."""
    names = [f"a{number}" for number in range(num_adapters) for _ in range(num_queued)]
    scheduler = queue_of(*data.draw(st.permutations(names)))
    order: list[str | None] = []
    while scheduler.num_waiting:
        order += names_of(scheduler.admit([], max_rows if not order else 1, admit_all))
    for first in range(len(order) - num_adapters + 1):
        assert len(set(order[first : first + num_adapters])) == num_adapters


@pytest.mark.parametrize("max_rows", [1, 2, 8])
@pytest.mark.parametrize("num_admitted_before", [0, 1, 7])
def test_one_with_a_thousand_requests_delays_another_by_one_admission(
    max_rows: int, num_admitted_before: int
) -> None:
    scheduler = queue_of(*["busy"] * 1000)
    active: list[Sequence] = []
    for _ in range(num_admitted_before):
        active = active[1 - max_rows :] if max_rows > 1 else []
        active += scheduler.admit(active, len(active) + 1, admit_all)
    scheduler.add(waiting_for("other"))
    next_ones: list[str | None] = []
    for _ in range(2):  # a row ends, a row begins
        active = active[1:]
        admitted = scheduler.admit(active, len(active) + 1, admit_all)
        next_ones += names_of(admitted)
        active += admitted
    assert "other" in next_ones


def test_one_that_asks_again_and_again_does_not_overtake_one_that_waits() -> None:
    scheduler = queue_of(*["patient"] * 3, "eager")
    order: list[str | None] = []
    while "patient" in names_of(scheduler.waiting):
        (admitted,) = scheduler.admit([], 1, admit_all)
        order.append(admitted.adapter_name)
        if admitted.adapter_name == "eager":
            scheduler.add(waiting_for("eager"))
    assert order == ["patient", "eager", "patient", "eager", "patient"]


@given(names=st.lists(st.sampled_from(["a", "b", None]), max_size=30), data=st.data())
def test_the_oldest_of_an_adapter_goes_first_and_nobody_is_lost(
    names: list[str | None], data: st.DataObject
) -> None:
    scheduler = queue_of(*names)
    everyone = scheduler.waiting
    active: list[Sequence] = []
    admitted: list[Sequence] = []
    max_rows = data.draw(st.integers(1, 5))
    while scheduler.num_waiting:
        heads = scheduler.heads(active)
        new = scheduler.admit(active, max_rows, admit_all)
        if new:
            assert new[0] is heads[0]
        admitted += new
        active += new
        assert len(active) <= max_rows
        ending = data.draw(st.sets(st.sampled_from(active), min_size=1))
        active = [one for one in active if one not in ending]
    assert set(admitted) == set(everyone)
    assert len(admitted) == len(everyone)
    for name in set(names):
        ages = [one.submitted_s for one in admitted if one.adapter_name == name]
        assert ages == sorted(ages)


def test_one_that_cannot_yet_is_passed_over_and_keeps_its_place() -> None:
    scheduler = queue_of("loading", "loading", "ready", None)

    def can_admit(sequence: Sequence) -> Admission:
        return Admission.NOT_YET if sequence.adapter_name == "loading" else Admission.YES

    assert names_of(scheduler.admit([], 4, can_admit)) == ["ready", None]
    assert scheduler.num_waiting == 2
    scheduler.add(waiting_for("ready"))
    assert names_of(scheduler.admit([], 1, admit_all)) == ["loading"]


def test_nobody_overtakes_one_that_there_is_no_memory_for() -> None:
    scheduler = queue_of("large", "small", "small")
    asked: list[str | None] = []

    def can_admit(sequence: Sequence) -> Admission:
        asked.append(sequence.adapter_name)
        return Admission.STOP if sequence.adapter_name == "large" else Admission.YES

    assert scheduler.admit([], 4, can_admit) == []
    assert asked == ["large"]
    assert scheduler.num_waiting == 3
    assert names_of(scheduler.admit([], 1, admit_all)) == ["large"]


def test_no_row_is_given_where_there_is_none() -> None:
    scheduler = queue_of("a", "b")
    active = [waiting_for("a"), waiting_for("a")]
    assert scheduler.admit(active, 2, admit_all) == []
    assert scheduler.admit(active, 1, admit_all) == []  # the limit has sunk below what runs
    assert names_of(scheduler.admit(active, 3, admit_all)) == ["b"]


def test_a_full_queue_refuses_and_takes_again_when_there_is_a_place() -> None:
    scheduler = Scheduler(max_waiting=2)
    for name in ("a", "b"):
        scheduler.add(waiting_for(name))
    with pytest.raises(QueueFullError, match="^2 requests are waiting"):
        scheduler.add(waiting_for("c"))
    assert scheduler.num_waiting == 2
    scheduler.admit([], 1, admit_all)
    scheduler.add(waiting_for("c"))


def test_what_is_removed_is_gone_and_the_others_keep_their_order() -> None:
    scheduler = queue_of("a", None, "a", "b", "a")
    gone = [one for one in scheduler.waiting if one.adapter_name == "b"]
    gone.append(scheduler.waiting[1])
    assert set(scheduler.remove(lambda one: one in gone)) == set(gone)
    assert scheduler.num_waiting == 3
    assert scheduler.remove(lambda one: one in gone) == []
    admitted = scheduler.admit([], 9, admit_all)
    assert names_of(admitted) == ["a", None, "a"]
    assert scheduler.heads([]) == scheduler.waiting == []


prompts = st.lists(st.integers(1, 400), max_size=12)
"""Tokens of each prompt; the last of them is not prefilled."""


@given(lengths=prompts, budget=st.integers(1, 300))
def test_shares_never_exceed_the_budget_and_serve_the_oldest(
    lengths: list[int], budget: int
) -> None:
    prefilling = [waiting_for(None, length) for length in lengths]
    pending = [one for one in prefilling if one.num_to_prefill > 0]
    shares = share_prefill(prefilling, budget)
    assert [one for one, _ in shares] == pending[: len(shares)]
    assert bool(shares) == bool(pending)
    for one, tokens in shares:
        assert 1 <= tokens <= one.num_to_prefill
    assert len(shares) * max((tokens for _, tokens in shares), default=0) <= budget
    if shares:
        oldest, tokens = shares[0]
        assert tokens >= min(oldest.num_to_prefill, max(1, budget // 2))
    if len(pending) > 1 and budget > 1:
        assert len(shares) > 1  # a long prompt does not stop those behind it


@given(lengths=prompts, budget=st.integers(2, 300))
def test_every_prompt_is_computed_in_a_bounded_number_of_steps(
    lengths: list[int], budget: int
) -> None:
    prefilling = [waiting_for(None, length) for length in lengths]
    finished_after: dict[Sequence, int] = {}
    steps = 0
    while shares := share_prefill(prefilling, budget):
        steps += 1
        for one, tokens in shares:
            one.num_prefilled += tokens
            if one.num_to_prefill == 0:
                finished_after[one] = steps
    assert len(finished_after) == sum(one.max_length > 2 for one in prefilling)
    half = budget // 2
    oldest = 0
    for one in prefilling:  # each is the oldest at last, and then gets half of the budget
        tokens = len(one.request.prompt) - 1
        oldest += -(-tokens // half)
        assert finished_after.get(one, 0) <= oldest
