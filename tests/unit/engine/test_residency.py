"""Which adapters are in memory: never too many, never one that is in use, none forgotten."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mlops.checkpoints import Checkpoint, CheckpointKind
from mlops.engine.residency import Adapter, AdapterRegistry, AdapterState
from mlops.errors import AdapterNotFoundError, EngineError, InvalidRequestError

CHECKPOINT = Checkpoint(
    path=Path("/adapter"),
    kind=CheckpointKind.ADAPTER,
    format="peft adapter",
    framework="transformers",
    description="an adapter",
    weight_files=(),
    weight_bytes=0,
    num_parameters=0,
    dtypes=(),
    tensors={},
    config={},
)


def registry_of(*names: str, budget: int = 100, slots: int | None = None) -> AdapterRegistry:
    registry = AdapterRegistry(budget_bytes=budget, max_resident=slots)
    for name in names:
        registry.register(name, CHECKPOINT, num_bytes=10)
    return registry


def load(registry: AdapterRegistry, adapter: Adapter, slot: int = 0) -> None:
    registry.mark_loading(adapter)
    registry.mark_resident(adapter, slot)
    registry.check()


def load_unused(registry: AdapterRegistry, name: str, slot: int) -> Adapter:
    adapter = registry.acquire(name)
    load(registry, adapter, slot)
    registry.release(adapter)
    return adapter


@pytest.mark.parametrize(
    "name", ["", " ", "base", "x" * 257, "a\nb", "a\x1b[2J", "\ud800", 7, None]
)
def test_names_that_are_not_allowed(name: object) -> None:
    registry = registry_of()
    with pytest.raises(InvalidRequestError) as caught:
        registry.register(name, CHECKPOINT, num_bytes=1)  # type: ignore[arg-type]
    assert caught.value.field == "name"
    assert str(caught.value).isprintable()
    assert registry.names == ()


def test_an_unknown_name_is_told_with_a_few_known_ones() -> None:
    registry = registry_of(*(f"adapter-{n}" for n in range(1000)))
    with pytest.raises(AdapterNotFoundError, match="'adapter-19', and 980 more") as caught:
        registry.acquire("x\n" * 10_000)
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()
    for call in (registry.unregister, lambda name: registry.pin(name, True)):
        with pytest.raises(AdapterNotFoundError):
            call("nobody")
    with pytest.raises(AdapterNotFoundError, match="has none"):
        registry_of().acquire("a")


def test_the_least_recently_used_goes_first() -> None:
    registry = registry_of("a", "b", "c", "d", slots=3)
    a, b, c = (load_unused(registry, name, slot) for slot, name in enumerate("abc"))
    registry.release(registry.acquire("a"))
    d = registry.acquire("d")
    assert registry.make_room(d, set()).evict == (b,)
    registry.pin("b", True)
    assert registry.make_room(d, set()).evict == (c,)
    registry.pin("b", False)
    waiting = registry.acquire("b")
    assert waiting is b
    registry.release(registry.acquire("c"))
    registry.release(registry.acquire("a"))
    assert registry.make_room(d, set()).evict == (c,), "b was used before c, but is waited for"
    room = registry.make_room(d, {a, c})
    assert (room.evict, room.drain) == ((b,), ())
    room = registry.make_room(d, {a, b, c})
    assert (room.evict, room.drain) == ((), (c,))


def test_as_many_leave_as_are_needed() -> None:
    registry = registry_of("a", "b", "c", "d", budget=40)
    big = registry.register("big", CHECKPOINT, num_bytes=25)
    a, b, c, d = (load_unused(registry, name, slot) for slot, name in enumerate("abcd"))
    assert registry.make_room(big, ()).evict == (a, b, c)
    room = registry.make_room(big, {a, b})
    assert (room.evict, room.drain) == ((c, d), (a,))
    for adapter in (a, b, c):
        with pytest.raises(EngineError, match="no room"):
            registry.mark_loading(big)
        registry.mark_evicted(adapter)
    assert registry.make_room(big, ()).evict == ()
    load(registry, big)


def test_what_can_never_fit_is_refused_with_numbers() -> None:
    registry = registry_of("a", "b", budget=20 * 2**20, slots=1)
    big = registry.register("big", CHECKPOINT, num_bytes=30 * 2**20)
    with pytest.raises(EngineError, match=r"'big' takes 30\.0 MiB; there are 20\.0 MiB"):
        registry.make_room(big, ())
    load_unused(registry, "a", 0)
    registry.pin("a", True)
    b = registry.acquire("b")
    with pytest.raises(EngineError, match="1 slots for adapters, of which 1 pinned"):
        registry.make_room(b, ())
    registry.pin("a", False)
    assert registry.make_room(b, ()).evict


def test_one_that_is_being_loaded_is_waited_for() -> None:
    registry = registry_of("a", "b", slots=1)
    a, b = registry.acquire("a"), registry.acquire("b")
    registry.mark_loading(a)
    assert registry.make_room(b, ()).drain == (a,)
    registry.mark_failed(a, EngineError("bad file"))
    assert registry.make_room(b, ()).drain == ()
    registry.check()


def test_a_failed_adapter_is_tried_again_by_the_next_request() -> None:
    registry = registry_of("a")
    adapter, error = registry.acquire("a"), EngineError("bad file")
    registry.mark_loading(adapter)
    registry.mark_failed(adapter, error)
    assert (adapter.state, adapter.error) == (AdapterState.FAILED, error)
    assert registry.num_resident == registry.num_resident_bytes == 0
    assert registry.describe()["failed"] == 1
    registry.release(adapter)
    registry.check()
    assert registry.acquire("a") is adapter
    assert (adapter.state, adapter.error) == (AdapterState.REGISTERED, None)
    load(registry, adapter)


def test_the_same_name_again_is_a_new_generation_and_the_old_one_drains() -> None:
    registry = registry_of("a")
    old = registry.acquire("a")
    load(registry, old)
    registry.pin("a", True)
    new = registry.register("a", CHECKPOINT, num_bytes=10, digest="sha256:1")
    assert new.generation > old.generation
    assert new.key != old.key
    assert registry.acquire("a") is new
    assert registry.names == ("a",)
    assert registry.drained() == []
    registry.release(old)
    assert registry.drained() == [old]
    registry.mark_evicted(old)
    assert registry.drained() == []
    registry.check()


@pytest.mark.parametrize("is_resident", [False, True])
def test_an_unregistered_adapter_still_serves_those_who_hold_it(is_resident: bool) -> None:
    registry = registry_of("a")
    held = registry.acquire("a")
    if is_resident:
        load(registry, held)
    assert registry.unregister("a") is held
    with pytest.raises(AdapterNotFoundError):
        registry.acquire("a")
    if not is_resident:
        assert registry.make_room(held, ()).drain == ()
        load(registry, held)
    assert registry.describe()["in_use"] == 1
    registry.release(held)
    assert registry.drained() == [held]
    registry.mark_evicted(held)
    assert registry.describe()["in_use"] == registry.num_resident == 0


def test_steps_out_of_order_are_refused() -> None:
    registry = registry_of("a")
    adapter = registry.acquire("a")
    for call in (
        lambda: registry.mark_resident(adapter, 0),
        lambda: registry.mark_evicted(adapter),
    ):
        with pytest.raises(EngineError, match="it is registered"):
            call()
    load(registry, adapter)
    for call in (
        lambda: registry.make_room(adapter, ()),
        lambda: registry.mark_loading(adapter),
        lambda: registry.mark_resident(adapter, 1),
        lambda: registry.mark_failed(adapter, EngineError("late")),
    ):
        with pytest.raises(EngineError, match="it is resident"):
            call()
    registry.release(adapter)
    with pytest.raises(EngineError, match="released twice"):
        registry.release(adapter)
    registry.check()


def test_threads_that_acquire_while_names_change() -> None:
    registry = registry_of("a", "b")
    errors: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for _ in range(300):
                adapter = registry.acquire(name)
                registry.register(name, CHECKPOINT, num_bytes=1)
                registry.release(adapter)
                registry.describe()
        except BaseException as exc:  # pragma: no cover
            errors.append(exc)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    registry.check()
    assert registry.describe()["in_use"] == 0


@given(st.text(max_size=300))
def test_any_name_is_taken_or_refused(name: str) -> None:
    registry = registry_of()
    try:
        adapter = registry.register(name, CHECKPOINT, num_bytes=1)
    except InvalidRequestError as exc:
        assert str(exc).isprintable()
    else:
        assert registry.acquire(name) is adapter
        assert name.isprintable()


BUDGET, SLOTS = 20, 3


class Requests(RuleBasedStateMachine):
    """Requests that come, wait, get rows and end, while adapters are replaced and pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.registry = AdapterRegistry(budget_bytes=BUDGET, max_resident=SLOTS)
        self.waiting: list[Adapter] = []
        self.rows: list[Adapter] = []
        self.all: list[Adapter] = []
        self.gone: list[Adapter] = []  # unloaded for good
        self.uses: list[Adapter] = []  # oldest first
        for name in "abcde":
            self.all.append(self.registry.register(name, CHECKPOINT, num_bytes=5))

    @rule(name=st.sampled_from("abcde"), num_bytes=st.integers(1, 12), pin=st.booleans())
    def register(self, name: str, num_bytes: int, pin: bool) -> None:
        self.all.append(self.registry.register(name, CHECKPOINT, num_bytes=num_bytes, pin=pin))

    @rule(data=st.data())
    @precondition(lambda self: self.registry.names)
    def unregister(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.registry.names))
        self.registry.unregister(name)
        assert name not in self.registry.names

    @rule(data=st.data())
    @precondition(lambda self: self.registry.names)
    def submit(self, data: st.DataObject) -> None:
        self._submit(data)

    @rule(data=st.data(), ends=st.booleans())
    @precondition(lambda self: self.registry.names)
    def submit_and_admit(self, data: st.DataObject, ends: bool) -> None:
        adapter = self._submit(data)
        if self._make_resident(adapter):
            self.waiting.remove(adapter)
            self.rows.append(adapter)
            if ends:
                self._end(self.rows, adapter)

    @rule(data=st.data())
    @precondition(lambda self: self.waiting)
    def admit(self, data: st.DataObject) -> None:
        adapter = data.draw(st.sampled_from(self.waiting))
        if adapter.state is AdapterState.FAILED or not self._make_resident(adapter):
            return
        self.waiting.remove(adapter)
        self.rows.append(adapter)

    @rule(data=st.data())
    @precondition(lambda self: self.rows)
    def finish(self, data: st.DataObject) -> None:
        self._end(self.rows, data.draw(st.sampled_from(self.rows)))

    @rule(data=st.data())
    @precondition(lambda self: self.waiting)
    def cancel(self, data: st.DataObject) -> None:
        self._end(self.waiting, data.draw(st.sampled_from(self.waiting)))

    @rule(data=st.data())
    @precondition(lambda self: any(a.state is AdapterState.REGISTERED for a in self.waiting))
    def fail(self, data: st.DataObject) -> None:
        on_disk = [a for a in self.waiting if a.state is AdapterState.REGISTERED]
        self.registry.mark_failed(data.draw(st.sampled_from(on_disk)), EngineError("bad file"))

    @rule(data=st.data(), is_pinned=st.booleans())
    @precondition(lambda self: self.registry.names)
    def pin(self, data: st.DataObject, is_pinned: bool) -> None:
        self.registry.pin(data.draw(st.sampled_from(self.registry.names)), is_pinned)

    @rule()
    def unload_drained(self) -> None:
        for adapter in self.registry.drained():
            assert adapter not in self.rows
            assert adapter not in self.waiting
            self._unload(adapter)
        assert self.registry.drained() == []

    @invariant()
    def records_add_up(self) -> None:
        self.registry.check()
        assert all(adapter.state is AdapterState.RESIDENT for adapter in self.rows)
        for adapter in self.all:
            assert adapter not in self.gone or adapter.state is AdapterState.REGISTERED
            assert adapter.num_users == self.waiting.count(adapter) + self.rows.count(adapter)

    def teardown(self) -> None:
        for requests in (self.rows, self.waiting):
            for adapter in list(requests):
                self._end(requests, adapter)
        for name in self.registry.names:
            self.registry.unregister(name)
        self.unload_drained()
        self.registry.check()
        counts = self.registry.describe()
        assert counts["loads"] == counts["evictions"]
        assert not any(counts[key] for key in ("registered", "resident", "in_use", "bytes"))

    def _submit(self, data: st.DataObject) -> Adapter:
        adapter = self.registry.acquire(data.draw(st.sampled_from(self.registry.names)))
        self.waiting.append(adapter)
        self.uses.append(adapter)
        return adapter

    def _end(self, requests: list[Adapter], adapter: Adapter) -> None:
        requests.remove(adapter)
        self.registry.release(adapter)
        self.uses.append(adapter)

    def _make_resident(self, adapter: Adapter) -> bool:
        if adapter.state is AdapterState.RESIDENT:
            return True
        in_memory = [a for a in self.all if a.state is AdapterState.RESIDENT]
        pinned = [a for a in in_memory if a.is_pinned]
        fits = adapter.num_bytes + sum(a.num_bytes for a in pinned) <= BUDGET
        try:
            room = self.registry.make_room(adapter, set(self.rows))
        except EngineError:
            assert len(pinned) >= SLOTS or not fits
            return False
        assert fits
        leaving = (*room.evict, *room.drain)
        assert not set(leaving) & set(pinned)
        assert set(room.drain) <= set(self.rows)
        assert not set(room.evict) & set(self.rows)
        self._check_order(room.evict, [a for a in in_memory if a not in (*pinned, *self.rows)])
        if room.drain:
            assert len(room.evict) == len([a for a in in_memory if a not in (*pinned, *self.rows)])
            return False
        if room.evict:
            kept = [a for a in in_memory if a not in room.evict[:-1]]
            num_bytes = sum(a.num_bytes for a in (*kept, adapter))
            assert num_bytes > BUDGET or len(kept) >= SLOTS, "more leave than are needed"
        for other in room.evict:
            self._unload(other)
        self.registry.mark_loading(adapter)
        slots = {a.slot for a in self.all if a.state is AdapterState.RESIDENT}
        self.registry.mark_resident(adapter, min(set(range(SLOTS)) - slots))
        return True

    def _unload(self, adapter: Adapter) -> None:
        assert adapter not in self.gone
        self.registry.mark_evicted(adapter)
        if not self._is_current(adapter) and not adapter.num_users:
            self.gone.append(adapter)

    def _check_order(self, evict: tuple[Adapter, ...], candidates: list[Adapter]) -> None:
        """Unused ones first, by their last use; none stays that should have gone before."""
        last = {adapter: number for number, adapter in enumerate(self.uses)}
        expected = sorted(candidates, key=lambda a: (a in self.waiting, last[a]))
        assert list(evict) == expected[: len(evict)]

    def _is_current(self, adapter: Adapter) -> bool:
        newest = max((a for a in self.all if a.name == adapter.name), key=lambda a: a.generation)
        return adapter is newest and adapter.name in self.registry.names


Requests.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestRequests = Requests.TestCase
