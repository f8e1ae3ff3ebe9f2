"""Ray's choice of a replica for each request: an `AdapterRouter` in each proxy and each replica.

Ray sends this module to them as it is, not by its name: what a process is to have once, such as its
record of owners, is in `affinity`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from ray.serve.request_router import (
    LocalityMixin,
    MultiplexMixin,
    PendingRequest,
    RequestRouter,
    RunningReplica,
)

from mlops.serving.ray.affinity import Owners, owners_of, preferences


class AdapterRouter(LocalityMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc]
    """Ray's choice of a replica: an adapter's owner first, the others when that one is full.

    A request says its adapter as Ray's "multiplexed model id": over HTTP in the header
    `serve_multiplexed_model_id`. Any other request goes to the less busy one of two replicas.
    """

    def initialize_state(self, adapters: Sequence[str] = ()) -> None:
        """Called by Ray with what the deployment gives its router."""
        owners = self._owners
        if not owners.adapters:  # else this is a replica, which knows better
            owners.adapters = tuple(sorted(adapters))

    @property
    def _owners(self) -> Owners:
        return owners_of(self._deployment_id.app_name, self._deployment_id.name)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray when replicas have come or gone."""
        super().update_replicas(replicas)
        self._owners.replicas = tuple(sorted(one.replica_id.unique_id for one in replicas))

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas; Ray takes the first rank that has room."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # after all ranks were full
            if adapter := pending_request.metadata.multiplexed_model_id:
                return self._ranks(adapter, candidate_replicas)
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]

    def _ranks(self, adapter: str, candidates: list[RunningReplica]) -> list[list[RunningReplica]]:
        owner = self._owners.of(adapter)
        first = [one for one in candidates if one.replica_id.unique_id == owner]
        by_id = {one.replica_id.unique_id: one for one in candidates if one not in first}
        return [first, *([by_id[name]] for name in preferences(adapter, by_id))]
