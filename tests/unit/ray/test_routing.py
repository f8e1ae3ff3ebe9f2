"""In which order Ray tries the replicas of a deployment."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from typing import Any

import pytest
from ray.serve.request_router import PendingRequest

from mlops.serving.ray.affinity import assign, owners_of
from mlops.serving.ray.routing import AdapterRouter


@dataclass(frozen=True)
class DeploymentName:
    app_name: str
    name: str = "deployment"


class Source(Enum):
    TEST = "TEST"


@dataclass(frozen=True)
class ReplicaName:
    unique_id: str


@dataclass(frozen=True)
class Replica:
    replica_id: ReplicaName


@dataclass(frozen=True)
class Metadata:
    multiplexed_model_id: str = ""


numbers = count()


@dataclass
class Routing:
    """A router of a deployment of its own, and what it would try."""

    adapters: tuple[str, ...] = ("a", "b", "c", "d")
    replicas: tuple[str, ...] = ("r1", "r2", "r3")
    candidates: list[Replica] = field(init=False)

    def __post_init__(self) -> None:
        name = DeploymentName(f"app-{next(numbers)}")
        self.owners = owners_of(name.app_name, name.name)
        self.router: Any = AdapterRouter(deployment_id=name, handle_source=Source.TEST)
        self.owners.replicas = self.replicas
        self.candidates = [Replica(ReplicaName(one)) for one in self.replicas]

    def ranks(self, adapter: str | None = "") -> list[list[str]]:
        """Replicas by id; None asks as Ray does when no request waits."""

        async def choose() -> list[list[Replica]]:
            pending = None
            if adapter is not None:
                pending = PendingRequest(args=[], kwargs={}, metadata=Metadata(adapter))
            chosen: list[list[Replica]] = await self.router.choose_replicas(
                self.candidates, pending
            )
            if pending is not None:  # or Ray would ask again and again without a pause
                assert pending.routing_context.should_backoff
            return chosen

        return [[one.replica_id.unique_id for one in rank] for rank in asyncio.run(choose())]


def test_an_adapters_owner_is_tried_first_and_then_every_other_replica() -> None:
    routing = Routing()
    routing.router.initialize_state(adapters=["d", "c", "b", "a"])
    for adapter in routing.adapters:
        (owner,), *others = routing.ranks(adapter)
        assert owner == assign(routing.adapters, routing.replicas)[adapter]
        assert sorted(name for (name,) in others) == sorted({*routing.replicas} - {owner})
        assert routing.ranks(adapter) == [[owner], *others]


def test_requests_for_adapters_reach_all_replicas_alike() -> None:
    routing = Routing(tuple(f"adapter-{number}" for number in range(30)))
    routing.router.initialize_state(adapters=routing.adapters)
    first = Counter(routing.ranks(adapter)[0][0] for adapter in routing.adapters)
    assert set(first.values()) == {10}


def test_an_owner_that_cannot_be_chosen_now_is_passed_over() -> None:
    routing = Routing()
    routing.router.initialize_state(adapters=routing.adapters)
    owner = routing.ranks("a")[0][0]
    routing.candidates = [one for one in routing.candidates if one.replica_id.unique_id != owner]
    tried = [name for rank in routing.ranks("a") for name in rank]
    assert sorted(tried) == sorted({*routing.replicas} - {owner})


@pytest.mark.parametrize("adapter", ["", None])
def test_any_other_request_goes_to_one_of_two_at_random(adapter: str | None) -> None:
    routing = Routing()
    seen = set()
    for _ in range(200):
        (two,) = routing.ranks(adapter)
        assert len(set(two)) == 2
        seen |= set(two)
    assert seen == set(routing.replicas)
    routing.candidates = routing.candidates[:1]
    assert routing.ranks(adapter) == [["r1"]]


def test_what_a_replica_knows_is_not_overwritten_by_what_was_deployed() -> None:
    routing = Routing()
    routing.owners.adapters = ("added", *routing.adapters)
    routing.router.initialize_state(adapters=routing.adapters)
    assert routing.owners.adapters == ("added", *routing.adapters)
