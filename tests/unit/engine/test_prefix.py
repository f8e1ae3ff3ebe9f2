"""What the prefix cache finds, beside a search through everything that was ever added."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops.engine.prefix import BLOCK_TOKENS, MIN_TOKENS, PrefixCache, PrefixMatch

AMPLE = 10**12


@dataclass(frozen=True)
class Added:
    """What the tests add: as value, it says itself what may be done with it."""

    namespace: str
    tokens: tuple[int, ...]
    can_cut: bool

    def num_served(self, namespace: str, tokens: tuple[int, ...]) -> int:
        if namespace != self.namespace:
            return 0
        pairs = zip(self.tokens, tokens, strict=False)
        same = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
        num_common = min(len(self.tokens), len(tokens)) if same is None else same
        is_useful = num_common >= MIN_TOKENS and (self.can_cut or num_common == len(self.tokens))
        return num_common if is_useful else 0

    def makes_needless(self, other: Added) -> bool:
        """All that `other` serves, this one serves."""
        is_longer = self.num_served(other.namespace, other.tokens) == len(other.tokens)
        return is_longer and (self.can_cut or self == other)


# Few pieces, shorter, longer and as long as a block, so that prompts share beginnings of all kinds.
PIECES = [(1,) * 16, (2,) * 16, (1,) * 5, (1,) * 4 + (3,), (2**32 - 1, 0) * 10, (4,)]
prompts = st.lists(st.sampled_from(PIECES), max_size=6).map(lambda pieces: sum(pieces, ()))
namespaces = st.sampled_from(["base", "adapter"])
added = st.builds(Added, namespaces, prompts, st.booleans())


def add(cache: PrefixCache, value: Added, num_bytes: int = 10) -> None:
    cache.add(value.namespace, value.tokens, value, num_bytes=num_bytes, can_cut=value.can_cut)


def check(found: PrefixMatch | None, namespace: str, tokens: tuple[int, ...]) -> int:
    """The match is what it says; returns its tokens."""
    if found is None:
        return 0
    assert found.num_tokens == found.value.num_served(namespace, tokens) > 0
    return found.num_tokens


@given(st.lists(added, max_size=12), st.lists(st.tuples(namespaces, prompts), max_size=8))
def test_finds_the_longest_of_all_that_was_added(
    values: list[Added], requests: list[tuple[str, tuple[int, ...]]]
) -> None:
    cache = PrefixCache(AMPLE)
    kept: list[Added] = []
    for value in values:
        add(cache, value)
        if len(value.tokens) >= MIN_TOKENS and not any(k.makes_needless(value) for k in kept):
            kept = [k for k in kept if not value.makes_needless(k)] + [value]
        assert (cache.num_entries, cache.num_bytes) == (len(kept), 10 * len(kept))
    lengths = []
    for namespace, tokens in [*requests, *((v.namespace, v.tokens) for v in values)]:
        lengths.append(check(cache.find(namespace, tokens), namespace, tokens))
        assert lengths[-1] == max((v.num_served(namespace, tokens) for v in values), default=0)
    assert cache.describe() == {
        "hits": sum(length > 0 for length in lengths),
        "misses": lengths.count(0),
        "hit_tokens": sum(lengths),
        "entries": len(kept),
        "bytes": 10 * len(kept),
        "evictions": 0,
    }


@given(
    st.integers(0, 60),
    st.lists(st.tuples(st.sampled_from(["add", "find", "forget"]), added, st.integers(1, 70))),
)
def test_within_any_budget_what_is_found_is_true(
    budget: int, actions: list[tuple[str, Added, int]]
) -> None:
    cache = PrefixCache(budget)
    for action, value, num_bytes in actions:
        if action == "add":
            add(cache, value, num_bytes)
        elif action == "find":
            check(cache.find(value.namespace, value.tokens), value.namespace, value.tokens)
        else:
            cache.forget(value.namespace)
            assert cache.find(value.namespace, value.tokens) is None
        assert 0 <= cache.num_bytes <= budget
    cache.drop(lambda _: False)
    assert (cache.num_entries, cache.num_bytes) == (0, 0)


@given(
    st.integers(1, 100),
    st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(1, 50)), max_size=40),
)
def test_the_least_recently_used_goes_first(
    budget: int, actions: list[tuple[bool, int, int]]
) -> None:
    cache = PrefixCache(budget)
    model: OrderedDict[int, int] = OrderedDict()
    num_evicted = 0
    for is_add, number, num_bytes in actions:
        tokens = (number,) * 20
        if is_add:
            cache.add("base", tokens, number, num_bytes=num_bytes, can_cut=True)
            if num_bytes <= budget:
                model.setdefault(number, num_bytes)
        else:
            assert (cache.find("base", tokens) is not None) == (number in model)
        if number in model and (not is_add or num_bytes <= budget):
            model.move_to_end(number)
        while sum(model.values()) > budget:
            model.popitem(last=False)
            num_evicted += 1
        assert cache.num_bytes == sum(model.values())
    assert cache.describe()["evictions"] == num_evicted
    for number in list(model):
        match = cache.find("base", (number,) * 20)
        assert match is not None
        assert match.value == number


def filled(*values: tuple[Any, tuple[int, ...], str, bool], budget: int = AMPLE) -> PrefixCache:
    cache = PrefixCache(budget)
    for namespace, tokens, value, can_cut in values:
        cache.add(namespace, tokens, value, num_bytes=10, can_cut=can_cut)
    return cache


TOKENS = tuple(range(40))


@pytest.mark.parametrize("num_common", [1, 15, 16, 17, 31, 32, 33, 39, 40])
def test_a_state_that_can_be_cut_serves_any_beginning(num_common: int) -> None:
    cache = filled(("base", TOKENS, "state", True))
    expected = PrefixMatch("state", num_common) if num_common >= MIN_TOKENS else None
    assert cache.find("base", TOKENS[:num_common]) == expected
    assert cache.find("base", (*TOKENS[:num_common], 99, *TOKENS)) == expected


@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 40])
def test_a_state_that_cannot_be_cut_serves_what_goes_on_from_all_of_it(length: int) -> None:
    cache = filled(("base", TOKENS[:length], "state", False))
    expected = PrefixMatch("state", length) if length >= MIN_TOKENS else None
    assert cache.find("base", TOKENS[:length]) == expected
    assert cache.find("base", (*TOKENS[:length], 99)) == expected
    assert cache.find("base", TOKENS[: length - 1]) is None
    assert cache.find("base", (*TOKENS[: length - 1], 99, 99)) is None


def test_namespaces_never_meet() -> None:
    cache = filled(((1, "a", "tenant"), TOKENS, "state", True))
    assert cache.find((1, "a", "other tenant"), TOKENS) is None
    assert cache.find((1, "b", "tenant"), TOKENS) is None
    assert cache.find((1, "a", "tenant"), TOKENS) is not None


def test_a_longer_state_takes_the_place_of_those_it_goes_on_from() -> None:
    cache = filled(
        ("base", TOKENS[:20], "not to be cut", False),
        ("base", TOKENS[:25], "short", True),
        ("base", TOKENS, "long", True),
    )
    assert cache.num_entries == 1
    assert cache.find("base", TOKENS[:20]) == PrefixMatch("long", 20)


def test_one_that_can_be_cut_takes_the_place_of_one_that_cannot() -> None:
    cache = filled(("base", TOKENS, "whole", False), ("base", TOKENS, "better", True))
    assert cache.num_entries == 1
    assert cache.find("base", TOKENS[:20]) == PrefixMatch("better", 20)


def test_a_state_that_cannot_be_cut_replaces_none() -> None:
    cache = filled(("base", TOKENS[:20], "short", True), ("base", TOKENS, "long", False))
    assert cache.find("base", TOKENS[:19]) == PrefixMatch("short", 19)
    assert cache.find("base", TOKENS) == PrefixMatch("long", 40)


def test_a_beginning_of_what_is_there_is_not_added_but_counts_as_use() -> None:
    other = (7,) * 20
    cache = filled(
        ("base", TOKENS, "long", True),
        ("base", other, "other", True),
        ("base", TOKENS[:30], "short", True),
        ("base", (8,) * 20, "third", True),
        budget=20,
    )
    assert cache.find("base", other) is None
    assert cache.find("base", TOKENS) == PrefixMatch("long", 40)


def test_one_larger_than_the_budget_costs_nobody_a_place() -> None:
    cache = filled(("base", TOKENS, "state", True), budget=10)
    cache.add("base", (*TOKENS, 1), "large", num_bytes=11, can_cut=True)
    assert cache.find("base", TOKENS) == PrefixMatch("state", 40)


def test_a_budget_of_nothing_does_nothing() -> None:
    cache = PrefixCache(0)
    cache.add("base", TOKENS, "state", num_bytes=0, can_cut=True)
    assert cache.find("base", TOKENS) is None
    assert set(cache.describe().values()) == {0}


def test_drop_keeps_what_it_is_told_to() -> None:
    cache = filled(*((("model", name), TOKENS, name, True) for name in ("a", "b", "c")))
    cache.drop(lambda namespace: namespace == ("model", "b"))
    assert [cache.find(("model", name), TOKENS) is not None for name in "abc"] == [0, 1, 0]
    assert cache.num_bytes == 10


def test_nothing_stays_of_a_namespace_without_values() -> None:
    cache = filled(*((number, TOKENS, "state", True) for number in range(9)), budget=20)
    asked: list[Hashable] = []

    def keep(namespace: Hashable) -> bool:
        asked.append(namespace)
        return True

    cache.drop(keep)
    assert asked == [7, 8]


def test_a_very_long_prompt_and_its_end() -> None:
    tokens = tuple(range(BLOCK_TOKENS * 20_000))
    cache = filled(("base", tokens, "state", True))
    assert cache.find("base", (*tokens[:-1], 0)) == PrefixMatch("state", len(tokens) - 1)
    cache.forget("base")
    assert cache.find("base", tokens) is None


class State:
    """A value whose end can be seen."""


@given(st.lists(st.tuples(added, st.integers(1, 40)), max_size=20))
def test_what_is_not_kept_is_let_go_of(actions: list[tuple[Added, int]]) -> None:
    cache = PrefixCache(100)
    states: list[weakref.ref[State]] = []
    for value, num_bytes in actions:
        state = State()
        states.append(weakref.ref(state))
        cache.add(value.namespace, value.tokens, state, num_bytes=num_bytes, can_cut=value.can_cut)
        del state
        assert sum(state() is not None for state in states) == cache.num_entries
