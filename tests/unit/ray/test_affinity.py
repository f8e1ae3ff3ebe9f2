"""Which replica an adapter belongs to."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops.serving.ray.affinity import Owners, assign, owners_of, preferences

names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)
adapters_of = st.lists(names, unique=True, max_size=60)
replicas_of = st.lists(names, unique=True, min_size=1, max_size=12)


@given(adapters_of, replicas_of)
def test_every_adapter_has_an_owner_and_no_replica_has_more_than_its_share(
    adapters: list[str], replicas: list[str]
) -> None:
    owners = assign(adapters, replicas)
    assert set(owners) == set(adapters)
    owned = Counter(owners.values())
    assert set(owned) <= set(replicas)
    assert max(owned.values(), default=0) <= -(-len(adapters) // len(replicas))


@given(adapters_of, replicas_of)
def test_replicas_own_as_many_adapters_as_the_next_give_or_take_one(
    adapters: list[str], replicas: list[str]
) -> None:
    owned = Counter(assign(adapters, replicas).values())
    counts = [owned[replica] for replica in replicas]
    assert max(counts) - min(counts) <= 1


@given(adapters_of, replicas_of, st.randoms())
def test_everybody_who_knows_the_same_finds_the_same_owners(
    adapters: list[str], replicas: list[str], order: random.Random
) -> None:
    expected = assign(adapters, replicas)
    order.shuffle(adapters)
    order.shuffle(replicas)
    assert assign(adapters, replicas) == expected
    assert assign(iter(adapters), tuple(replicas)) == expected


def test_owners_are_the_same_in_every_process() -> None:
    """Python's own hash of a text is not."""
    assert preferences("formal", ["a", "b", "c", "d"]) == ["b", "d", "c", "a"]


def test_without_replicas_nobody_owns_anything() -> None:
    assert assign(["a", "b"], []) == {}
    assert assign([], ["r"]) == {}


ADAPTERS = [f"adapter-{number}" for number in range(1000)]


def replica_ids(seed: int, number: int) -> list[str]:
    """Random, as Ray's are."""
    chosen = random.Random(seed)  # noqa: S311
    return [f"{chosen.getrandbits(64):016x}" for _ in range(number)]


def num_moved(before: Sequence[str], after: Sequence[str]) -> int:
    """How many adapters have another owner, of those whose owner was and is there."""
    old, new = assign(ADAPTERS, before), assign(ADAPTERS, after)
    there = [one for one in ADAPTERS if old[one] in after and new[one] in before]
    return sum(old[one] != new[one] for one in there)


@pytest.mark.parametrize("seed", range(5))
def test_when_a_replica_comes_or_goes_few_adapters_of_the_others_move(seed: int) -> None:
    """The 100 of one of ten replicas move. Of the 900 others 800 would if owners were drawn anew,
    and none if there were no bound on what a replica owns; the bound moves those at the edge.
    """
    replicas = replica_ids(seed, 10)
    assert num_moved(replicas, replicas[:-1]) < 900 / 20
    assert num_moved(replicas[:-1], replicas) < 900 / 20


@pytest.mark.parametrize("seed", range(5))
def test_when_an_adapter_comes_few_others_move(seed: int) -> None:
    replicas = replica_ids(seed, 10)
    before, after = assign(ADAPTERS, replicas), assign([*ADAPTERS, "new"], replicas)
    assert sum(before[one] != after[one] for one in ADAPTERS) < 1000 / 20


@given(names, replicas_of)
def test_preferences_name_every_replica_once(adapter: str, replicas: list[str]) -> None:
    order = preferences(adapter, replicas)
    assert sorted(order) == sorted(replicas)
    assert preferences(adapter, reversed(replicas)) == order


@given(names, replicas_of, st.data())
def test_the_order_of_those_that_stay_is_kept(
    adapter: str, replicas: list[str], data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(replicas))
    order = preferences(adapter, replicas)
    rest = [one for one in replicas if one != gone]
    assert preferences(adapter, rest) == [one for one in order if one != gone]


def test_while_no_replica_is_known_there_is_no_owner() -> None:
    owners = Owners(adapters=("a",))
    assert owners.of("a") is None
    assert owners.of("unknown") is None


def test_an_adapter_that_nobody_was_told_of_has_an_owner_that_stays() -> None:
    owners = Owners(adapters=("a",), replicas=("r1", "r2", "r3"))
    found = owners.of("unknown")
    assert found in owners.replicas
    owners.adapters = ("a", "b")
    assert owners.of("unknown") == found


def test_owners_follow_what_comes_and_goes() -> None:
    owners = Owners()
    for adapters, replicas in (
        (("a", "b"), ("r1",)),
        (("a", "b"), ("r1", "r2")),
        (("a", "b", "c"), ("r1", "r2")),
        (("a", "b", "c"), ("r2", "r3")),
        (("a", "b"), ("r1",)),
        ((), ("r1",)),
    ):
        owners.adapters, owners.replicas = adapters, replicas
        assert {one: owners.of(one) for one in adapters} == assign(adapters, replicas)
    owners.replicas = ()
    assert owners.of("a") is None


def test_each_deployment_has_owners_of_its_own() -> None:
    assert owners_of("app", "one") is owners_of("app", "one")
    assert owners_of("app", "one") is not owners_of("app", "two")
    assert owners_of("app", "one") is not owners_of("another", "one")
