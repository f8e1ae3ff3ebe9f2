"""Adapters into memory when requests need them, and out of it when others do.

    registered -> room is made -> files verified, in a thread of their own -> written into a slot

`residency` decides who leaves; here it is done.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from mlops.engine.banks import AdapterBanks
from mlops.engine.owner import run_in_owner, to_exception
from mlops.engine.residency import Adapter, AdapterRegistry, AdapterState
from mlops.errors import EngineError, MLOpsError

logger = logging.getLogger(__name__)


class Asking(Protocol):
    """A request for an adapter, or for the base model."""

    @property
    def adapter(self) -> Adapter | None: ...


class AdapterLoader:
    """Loads and unloads the adapters of one engine; in the owner thread, but for `preload`.

    Args:
        finish_step: waits for the step under way. Banks are written between steps only: a step
            that still holds their arrays would make every write a copy of all of them.
        wake: has the engine look at its requests again.
    """

    def __init__(
        self,
        registry: AdapterRegistry,
        banks: AdapterBanks,
        *,
        finish_step: Callable[[], None],
        wake: Callable[[], None],
    ) -> None:
        self._registry = registry
        self._banks = banks
        self._finish_step = finish_step
        self._wake = wake
        self._verified: queue.SimpleQueue[tuple[Adapter, Exception | None]] = queue.SimpleQueue()
        self._drains: tuple[Adapter, frozenset[Adapter]] | None = None  # for whom who must leave

    def can_use(self, adapter: Adapter | None) -> bool:
        """True when a request for it may get a row now; None is the base model."""
        if adapter is None:
            return True
        is_draining = self._drains is not None and adapter in self._drains[1]
        return adapter.state is AdapterState.RESIDENT and not is_draining

    def has_failed(self, adapter: Adapter | None) -> bool:
        """True when it could not be loaded."""
        return adapter is not None and adapter.state is AdapterState.FAILED

    def load_for(self, heads: Iterable[Asking], active: Iterable[Asking]) -> None:
        """Begin to load what the requests need that are next, the first of them first.

        Where only adapters with rows could make room, these get no further rows until they have,
        and nothing later is loaded: it would take the room that is being made.
        """
        in_use = {one.adapter for one in active if one.adapter is not None}
        drains, self._drains = self._drains, None
        claimed: set[Adapter] = set()  # by requests that are sooner, though they have no rows yet
        for sequence in heads:
            adapter = sequence.adapter
            if adapter is None:
                continue
            if adapter.state is AdapterState.REGISTERED and not self._try_begin(
                adapter,
                in_use,
                claimed,
                drains[1] if drains and drains[0] is adapter else frozenset(),
            ):
                return
            claimed.add(adapter)

    def finish_loading(self) -> None:
        """Load what has been verified since the last call."""
        while not self._verified.empty():
            self._load(*self._verified.get())

    def unload_drained(self) -> list[tuple[Any, ...]]:
        """Unload what was replaced or removed and has no users; gives their keys."""
        drained = self._registry.drained()
        for adapter in drained:
            self._evict(adapter)
        return [adapter.key for adapter in drained]

    def preload(self, names: Iterable[str]) -> None:
        """Load adapters, in this order, as long as there is room.

        Raises:
            MLOpsError: one of them is damaged or cannot be used.
        """
        for name in names:
            adapter = self._registry.acquire(name)
            try:
                if adapter.verify is not None:
                    adapter.verify()
                if not run_in_owner(self._try_load, adapter):
                    return
                if adapter.error is not None:
                    raise adapter.error
            finally:
                self._registry.release(adapter)

    def _try_begin(
        self,
        adapter: Adapter,
        in_use: set[Adapter],
        claimed: set[Adapter],
        draining: frozenset[Adapter],
    ) -> bool:
        """Begin to load an adapter; False means that there is no room yet."""
        try:
            room = self._registry.make_room(adapter, in_use | claimed)
        except EngineError as exc:
            self._registry.mark_failed(adapter, exc)
            return True
        if claimed.intersection(room.drain):
            return False
        if room.drain:
            # Those chosen before stay chosen, or new requests could keep all of them busy.
            stays = not draining.isdisjoint(in_use) and not any(one.is_pinned for one in draining)
            self._drains = adapter, draining if stays else frozenset(room.drain)
            return False
        for other in room.evict:
            self._evict(other)
        self._registry.mark_loading(adapter)
        if adapter.verify is None:
            self._load(adapter)
        else:
            threading.Thread(
                target=self._verify, args=(adapter,), name="mlops-verify-adapter", daemon=True
            ).start()
        return True

    def _verify(self, adapter: Adapter) -> None:
        error = None
        try:
            if adapter.verify is not None:
                adapter.verify()
        except BaseException as exc:
            error = to_exception(exc)
        self._verified.put((adapter, error))
        self._wake()

    def _try_load(self, adapter: Adapter) -> bool:
        """Load an adapter unless others would have to go for it; False means that it is full."""
        if adapter.state is not AdapterState.REGISTERED:
            return True
        room = self._registry.make_room(adapter, ())
        if room.evict or room.drain:
            return False
        self._registry.mark_loading(adapter)
        self._load(adapter)
        return True

    def _load(self, adapter: Adapter, error: Exception | None = None) -> None:
        """Write an adapter into a slot, unless it turned out to be damaged."""
        if error is not None:
            self._registry.mark_failed(adapter, error)
            return
        try:
            self._finish_step()
            slot = self._banks.load(adapter.name, adapter.checkpoint)
            self._banks.try_out(slot, adapter.checkpoint)
        except BaseException as exc:
            error = to_exception(exc)
            if not isinstance(error, MLOpsError):
                logger.exception("the adapter %r could not be loaded", adapter.name)
                error = EngineError(f"the adapter {adapter.name!r} could not be loaded: {error}")
            self._registry.mark_failed(adapter, error)
        else:
            self._registry.mark_resident(adapter, slot)

    def _evict(self, adapter: Adapter) -> None:
        if adapter.slot is not None:
            self._banks.unload(adapter.slot)
        self._registry.mark_evicted(adapter)
