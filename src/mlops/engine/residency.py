"""Which adapters are registered, which are in memory, and which must make room for another.

    register -> REGISTERED -> LOADING -> RESIDENT -> (evicted) REGISTERED -> …
                                 `-> FAILED -> (the next request) REGISTERED

Policy only: it imports no MLX and knows no arrays; the engine loads and unloads. Any number of
adapters can be registered, and as many are in memory as the budget allows. A request holds its
adapter from submission to its end, so one that is replaced or unregistered answers what was asked
of it and is unloaded when the last of these requests has ended.
"""

from __future__ import annotations

import enum
import itertools
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from mlops.checkpoints import Checkpoint, TokenizerFiles
from mlops.engine.request import BASE_NAME
from mlops.errors import AdapterNotFoundError, EngineError, InvalidRequestError

MAX_NAME_CHARACTERS = 256
MAX_NAMES_IN_MESSAGE = 20

_generations = itertools.count(1)


class AdapterState(enum.StrEnum):
    """Where an adapter is."""

    REGISTERED = "registered"  # on disk
    LOADING = "loading"  # its memory is taken
    RESIDENT = "resident"  # in a slot
    FAILED = "failed"  # it could not be loaded; the next request tries again


@dataclass(eq=False)
class Adapter:
    """One generation of one name. Written by its registry only.

    Attributes:
        generation: counts all registrations of this process, from 1.
        digest: of its files, when it is known.
        num_bytes: that it takes in memory.
        verify: hashes its files and raises what is wrong; None when there is nothing to compare.
        tokenizer: files of its own tokenizer; None where requests for it are written as the base's.
        is_pinned: never evicted.
        num_users: requests that hold it, waiting ones included.
        slot: where it is while it is resident.
        error: why it has failed.
        last_used: the registry's count of acquisitions and releases at its last one.
    """

    name: str
    generation: int
    checkpoint: Checkpoint
    digest: str | None
    num_bytes: int
    verify: Callable[[], None] | None = field(default=None, repr=False)
    tokenizer: TokenizerFiles | None = field(default=None, repr=False)
    is_pinned: bool = False
    num_users: int = 0
    state: AdapterState = AdapterState.REGISTERED
    slot: int | None = None
    error: Exception | None = None
    last_used: int = 0

    @property
    def key(self) -> tuple[str, str | None, int]:
        """What makes cached state of this adapter different from any other's."""
        return self.name, self.digest, self.generation


@dataclass(frozen=True)
class Room:
    """How an adapter gets its memory.

    Attributes:
        evict: to be unloaded, in this order. Requests that wait for one of them load it again.
        drain: have rows, or are being loaded. While there are any, evict none: let their rows end,
            begin no later request for them, and ask again.
    """

    evict: tuple[Adapter, ...] = ()
    drain: tuple[Adapter, ...] = ()


class AdapterRegistry:
    """The adapters of one model.

    `register`, `unregister`, `find`, `acquire`, `share`, `release`, `pin`, `names` and `describe`
    may be called from any thread; what concerns memory is for the engine's owner thread.

    Args:
        budget_bytes: memory for adapters.
        max_resident: how many slots there are; None is no limit.
    """

    def __init__(self, *, budget_bytes: int, max_resident: int | None = None) -> None:
        self._budget_bytes = budget_bytes
        self._max_resident = max_resident
        self._lock = threading.RLock()
        self._current: dict[str, Adapter] = {}
        self._retired: set[Adapter] = set()  # replaced or unregistered; with users or in memory
        self._in_memory: set[Adapter] = set()  # loading or resident
        self._num_uses = 0
        self._num_loads = 0
        self._num_evictions = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names that a request may use, in the order of their first registration."""
        with self._lock:
            return tuple(self._current)

    @property
    def num_resident(self) -> int:
        """Adapters in memory, those being loaded included."""
        with self._lock:
            return len(self._in_memory)

    @property
    def num_resident_bytes(self) -> int:
        """Memory of these."""
        with self._lock:
            return sum(adapter.num_bytes for adapter in self._in_memory)

    def register(
        self,
        name: str,
        checkpoint: Checkpoint,
        *,
        num_bytes: int,
        digest: str | None = None,
        verify: Callable[[], None] | None = None,
        tokenizer: TokenizerFiles | None = None,
        pin: bool = False,
    ) -> Adapter:
        """Make an adapter known under a name; nothing is loaded yet.

        A name that is there already means the new adapter from now on.

        Args:
            num_bytes: memory that it takes once it is loaded.
            verify: raises when its files are not what they should be; called before each load.
            tokenizer: files of its own tokenizer.
            pin: never evict it.

        Raises:
            InvalidRequestError: the name is not allowed.
        """
        _check_name(name)
        with self._lock:
            adapter = Adapter(
                name,
                next(_generations),
                checkpoint,
                digest,
                num_bytes,
                verify,
                tokenizer,
                is_pinned=pin,
            )
            if old := self._current.get(name):
                self._retire(old)
            self._current[name] = adapter
            return adapter

    def unregister(self, name: str) -> Adapter:
        """Forget a name. Requests for it that wait or run are still answered.

        Raises:
            AdapterNotFoundError: there is no such name.
        """
        with self._lock:
            adapter = self._find(name)
            del self._current[name]
            self._retire(adapter)
            return adapter

    def find(self, name: str) -> Adapter:
        """The adapter that this name means now; nobody holds it.

        Raises:
            AdapterNotFoundError: there is no such name.
        """
        with self._lock:
            return self._find(name)

    def acquire(self, name: str) -> Adapter:
        """The adapter of this name, held for one request until `release`.

        Raises:
            AdapterNotFoundError: there is no such name.
        """
        with self._lock:
            adapter = self._find(name)
            if adapter.state is AdapterState.FAILED:
                adapter.state, adapter.error = AdapterState.REGISTERED, None
            adapter.num_users += 1
            self._touch(adapter)
            return adapter

    def share(self, adapter: Adapter) -> None:
        """One more user of an adapter that somebody holds, whatever its name means by now.

        Raises:
            EngineError: nobody holds it.
        """
        with self._lock:
            if adapter.num_users == 0:
                raise EngineError(f"nobody holds the adapter {adapter.name!r}")
            adapter.num_users += 1

    def release(self, adapter: Adapter) -> None:
        """Give back what `acquire` gave, once for each time.

        Raises:
            EngineError: nobody holds it.
        """
        with self._lock:
            if adapter.num_users == 0:
                raise EngineError(f"the adapter {adapter.name!r} is released twice")
            adapter.num_users -= 1
            self._touch(adapter)
            self._forget_when_done(adapter)

    def pin(self, name: str, is_pinned: bool) -> None:
        """Say whether an adapter, once it is loaded, stays in memory.

        Raises:
            AdapterNotFoundError: there is no such name.
        """
        with self._lock:
            self._find(name).is_pinned = is_pinned

    def make_room(self, adapter: Adapter, active: Collection[Adapter]) -> Room:
        """What must leave the memory before `adapter` is loaded.

        Those that no request holds go first, then those that requests only wait for, then those
        with rows; in each group the least recently used.

        Args:
            active: adapters of rows in prefill or decode, which cannot be evicted.

        Raises:
            EngineError: it does not fit beside the pinned adapters, whatever else leaves.
        """
        with self._lock:
            self._check_state("make room for", adapter, AdapterState.REGISTERED)
            self._check_can_ever_fit(adapter)
            num_bytes, num_resident = self.num_resident_bytes, self.num_resident
            evict: list[Adapter] = []
            drain: list[Adapter] = []
            for other in self._in_order_of_leaving(active):
                if self._fits(adapter, num_bytes, num_resident):
                    break
                is_busy = other in active or other.state is AdapterState.LOADING
                (drain if is_busy else evict).append(other)
                num_bytes -= other.num_bytes
                num_resident -= 1
            return Room(tuple(evict), tuple(drain))

    def mark_loading(self, adapter: Adapter) -> None:
        """Its memory is taken from now on.

        Raises:
            EngineError: there is no room for it.
        """
        with self._lock:
            self._check_state("load", adapter, AdapterState.REGISTERED)
            if not self._fits(adapter, self.num_resident_bytes, self.num_resident):
                raise EngineError(f"there is no room to load the adapter {adapter.name!r}")
            adapter.state = AdapterState.LOADING
            self._in_memory.add(adapter)

    def mark_resident(self, adapter: Adapter, slot: int) -> None:
        """It is in memory, in this slot."""
        with self._lock:
            self._check_state("finish loading", adapter, AdapterState.LOADING)
            adapter.state, adapter.slot = AdapterState.RESIDENT, slot
            self._num_loads += 1

    def mark_evicted(self, adapter: Adapter) -> None:
        """Its slot and its memory are free."""
        with self._lock:
            self._check_state("evict", adapter, AdapterState.RESIDENT)
            adapter.state, adapter.slot = AdapterState.REGISTERED, None
            self._in_memory.remove(adapter)
            self._num_evictions += 1
            self._forget_when_done(adapter)

    def mark_failed(self, adapter: Adapter, error: Exception) -> None:
        """It could not be loaded: `error` is for the requests that wait for it."""
        with self._lock:
            self._check_state("give up", adapter, AdapterState.REGISTERED, AdapterState.LOADING)
            adapter.state, adapter.error = AdapterState.FAILED, error
            self._in_memory.discard(adapter)
            self._forget_when_done(adapter)

    def drained(self) -> list[Adapter]:
        """Replaced or unregistered, in memory and held by nobody: to be unloaded now."""
        if not self._retired:
            return []
        with self._lock:
            return [
                adapter
                for adapter in self._retired
                if adapter.state is AdapterState.RESIDENT and adapter.num_users == 0
            ]

    def describe(self) -> dict[str, int]:
        """Counts, for statistics.

        Returns:
            `registered`, `resident`, `loading`, `failed`, `pinned`, `in_use` (held by requests),
            `bytes`, `budget_bytes`, `loads` and `evictions`, the last two since the start.
        """
        with self._lock:
            known = [*self._current.values(), *self._retired]
            states = [adapter.state for adapter in known]
            return {
                "registered": len(self._current),
                "resident": states.count(AdapterState.RESIDENT),
                "loading": states.count(AdapterState.LOADING),
                "failed": states.count(AdapterState.FAILED),
                "pinned": sum(adapter.is_pinned for adapter in known),
                "in_use": sum(adapter.num_users > 0 for adapter in known),
                "bytes": self.num_resident_bytes,
                "budget_bytes": self._budget_bytes,
                "loads": self._num_loads,
                "evictions": self._num_evictions,
            }

    def check(self) -> None:
        """Compare the records with each other, for tests.

        Raises:
            EngineError: they do not add up.
        """
        with self._lock:
            known = {*self._current.values(), *self._retired}
            in_memory = {
                adapter
                for adapter in known
                if adapter.state in (AdapterState.LOADING, AdapterState.RESIDENT)
            }
            slots = [adapter.slot for adapter in known if adapter.slot is not None]
            resident = {adapter for adapter in known if adapter.state is AdapterState.RESIDENT}
            limit = len(in_memory) if self._max_resident is None else self._max_resident
            facts = {
                "an adapter is current and retired": len(known)
                == len(self._current) + len(self._retired),
                "a name leads to another name": all(
                    name == adapter.name for name, adapter in self._current.items()
                ),
                "a state contradicts the memory": in_memory == self._in_memory,
                "the memory is over its budget": self.num_resident_bytes <= self._budget_bytes,
                "more adapters than slots": len(in_memory) <= limit,
                "a slot has two adapters": len(slots) == len(set(slots)),
                "a slot without a resident": resident == {a for a in known if a.slot is not None},
                "an error without a failure": all(
                    (adapter.error is not None) == (adapter.state is AdapterState.FAILED)
                    for adapter in known
                ),
                "a retired adapter is pinned": not any(a.is_pinned for a in self._retired),
                "a retired adapter is kept for nobody": all(
                    adapter.num_users or adapter in in_memory for adapter in self._retired
                ),
                "an adapter has fewer than no users": all(a.num_users >= 0 for a in known),
                "more evictions than loads": self._num_loads - self._num_evictions == len(resident),
            }
            if wrong := [fact for fact, holds in facts.items() if not holds]:
                raise EngineError(f"the adapters' records do not add up: {'; '.join(wrong)}")

    def _find(self, name: str) -> Adapter:
        adapter = self._current.get(name)
        if adapter is None:
            known = [repr(one) for one in itertools.islice(self._current, MAX_NAMES_IN_MESSAGE)]
            if len(self._current) > len(known):
                known.append(f"and {len(self._current) - len(known)} more")
            raise AdapterNotFoundError(
                f"there is no adapter {name[:100]!r}; this model has {', '.join(known) or 'none'}, "
                f'and "{BASE_NAME}" for no adapter'
            )
        return adapter

    def _touch(self, adapter: Adapter) -> None:
        self._num_uses += 1
        adapter.last_used = self._num_uses

    def _retire(self, adapter: Adapter) -> None:
        adapter.is_pinned = False
        self._retired.add(adapter)
        self._forget_when_done(adapter)

    def _forget_when_done(self, adapter: Adapter) -> None:
        if adapter.num_users == 0 and adapter not in self._in_memory:
            self._retired.discard(adapter)

    def _fits(self, adapter: Adapter, num_bytes: int, num_resident: int) -> bool:
        """Whether it fits beside so many others."""
        has_slot = self._max_resident is None or num_resident < self._max_resident
        return has_slot and num_bytes + adapter.num_bytes <= self._budget_bytes

    def _check_can_ever_fit(self, adapter: Adapter) -> None:
        pinned = [other for other in self._in_memory if other.is_pinned]
        num_bytes = sum(other.num_bytes for other in pinned)
        if not self._fits(adapter, num_bytes, len(pinned)):
            slots = "" if self._max_resident is None else f" and {self._max_resident} slots"
            raise EngineError(
                f"the adapter {adapter.name!r} takes {_mib(adapter.num_bytes)}; there are "
                f"{_mib(self._budget_bytes)}{slots} for adapters, of which {len(pinned)} pinned "
                f"ones hold {_mib(num_bytes)}: raise the limit or unpin one"
            )

    def _in_order_of_leaving(self, active: Collection[Adapter]) -> list[Adapter]:
        def order(adapter: Adapter) -> tuple[bool, bool, int]:
            is_busy = adapter in active or adapter.state is AdapterState.LOADING
            return is_busy, adapter.num_users > 0, adapter.last_used

        return sorted((one for one in self._in_memory if not one.is_pinned), key=order)

    def _check_state(self, action: str, adapter: Adapter, *allowed: AdapterState) -> None:
        if adapter.state not in allowed:
            raise EngineError(
                f"cannot {action} the adapter {adapter.name!r}: it is {adapter.state}"
            )


def _check_name(name: object) -> None:
    if (
        not isinstance(name, str)
        or not name.strip()
        or name == BASE_NAME
        or len(name) > MAX_NAME_CHARACTERS
        or not name.isprintable()
    ):
        shown = repr(name[:100]) if isinstance(name, str) else f"a {type(name).__name__}"
        raise InvalidRequestError(
            f"an adapter cannot be called {shown}; give 1 to {MAX_NAME_CHARACTERS} printable "
            f"characters, other than {BASE_NAME!r}, which asks for the base model",
            "name",
        )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
