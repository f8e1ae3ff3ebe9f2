"""Which replica an adapter belongs to.

    adapters + replicas -> `Owners` -> the adapter's replica

Whoever knows the same adapters and replicas computes the same owners, so nobody has to agree with
anybody. Each replica owns as many adapters as the next, give or take one, and when a replica comes
or goes few adapters move.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass
class Owners:
    """Adapters and the replicas that they belong to, as far as this process knows them.

    Attributes:
        adapters: names, sorted.
        replicas: their ids, sorted.
    """

    adapters: tuple[str, ...] = ()
    replicas: tuple[str, ...] = ()
    _known: tuple[Any, Mapping[str, str]] = (None, MappingProxyType({}))

    def of(self, adapter: str) -> str | None:
        """The replica that the adapter belongs to; None while no replica is known."""
        now = (self.adapters, self.replicas)
        known_for, owners = self._known  # at once: other threads ask too
        if known_for != now:
            owners = assign(*now)
            self._known = (now, owners)
        owner = owners.get(adapter)
        if owner is None and self.replicas:  # an adapter that this process has not heard of
            owner = preferences(adapter, self.replicas)[0]
        return owner


def assign(adapters: Iterable[str], replicas: Sequence[str]) -> Mapping[str, str]:
    """The owner of each adapter: rendezvous hashing with a bound on what one replica owns.

    An adapter's owner is the first of its preferences that has not got its share yet.
    """
    if not replicas:
        return {}
    names = sorted(adapters)
    share, num_larger = divmod(len(names), len(replicas))
    num_owned = dict.fromkeys(replicas, 0)
    owners = {}
    for adapter in names:
        limit = share + (num_larger > 0)
        owner = next(one for one in preferences(adapter, replicas) if num_owned[one] < limit)
        num_larger -= num_owned[owner] == share  # so many may still have one more
        num_owned[owner] += 1
        owners[adapter] = owner
    return owners


def preferences(adapter: str, replicas: Iterable[str]) -> list[str]:
    """All replicas, in an order of the adapter's own that the others' coming and going keeps."""

    def weight(replica: str) -> bytes:
        return hashlib.blake2b(f"{replica}\0{adapter}".encode(), digest_size=8).digest()

    return sorted(replicas, key=weight, reverse=True)


_owners: dict[tuple[str, str], Owners] = {}


def owners_of(application: str, deployment: str) -> Owners:
    """This process's record of one deployment; the same object each time."""
    return _owners.setdefault((application, deployment), Owners())
