"""How Ray Serve picks the replica that our ranking names. The one module on Serve's alpha API; made for Ray 2.60.

Serve ships this module to every process by value: state that others are to see has to live in another one.
"""

import random
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deployments.serve.replica_list import tell_watcher


class RankedRequestRouter(RequestRouter):  # type: ignore[misc]
    """Sends a call to the first replica of the ranking in its second argument that is there and takes it.

    Replicas that the ranking does not name come last, in random order: a call waits only where there is none at all.
    Serve takes the replica with the shortest queue within a rank, so every rank has one replica.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of one replica each."""
        others = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        ranked = []
        if pending_request is not None:
            # Serve comes back at once, for ever, unless it is told to wait a little after all have refused.
            pending_request.routing_context.should_backoff = True
            ranking = pending_request.args[1] if len(pending_request.args) > 1 else ()
            ranked = [others.pop(replica_id) for replica_id in ranking if replica_id in others]
        rest = list(others.values())
        random.shuffle(rest)
        return [[replica] for replica in (*ranked, *rest)]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's list of running replicas has changed."""
        super().update_replicas(replicas)
        self._tell()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """A call found a replica dead before Serve's list says so."""
        super().on_replica_actor_died(replica_id)
        self._tell()

    def _tell(self) -> None:
        deployment: Any = self._deployment_id
        running = frozenset(replica_id.unique_id for replica_id in self.curr_replicas)
        tell_watcher(deployment.app_name, deployment.name, running)
