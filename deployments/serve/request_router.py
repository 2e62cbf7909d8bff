"""Has Ray Serve pick the replica that our ranking names. Only this module uses Serve's alpha API, of Ray 2.60.

Serve ships this module to every process by value: state that other modules should see has to live in another one.
"""

import random
import time
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deployments.serve.replica_list import tell_watcher

_KEEP_LEAVING_S = 15.0
"""How long a replica is kept after it left Serve's list, or after a ranking last named it."""


class RankedRequestRouter(RequestRouter):  # type: ignore[misc]
    """Sends a call to the first replica in the ranking (its second argument) that is available and accepts it.

    Replicas that the ranking does not name come last, in random order: a call waits only if there is no replica at all.
    Serve takes the replica with the shortest queue within a rank, so every rank has one replica.

    A replica that Serve is removing finishes its calls and accepts others until it has none. It is therefore kept for a
    while, for rankings that name it.
    """

    def initialize_state(self) -> None:
        """Serve calls this once, before anything else."""
        self._leaving: dict[ReplicaID, float] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of one replica each."""
        candidates = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        ranked = []
        if pending_request is not None:
            # Serve retries at once, forever, unless it is told to wait a little after all have refused.
            pending_request.routing_context.should_backoff = True
            ranking = pending_request.args[1] if len(pending_request.args) > 1 else ()
            ranked = [candidates.pop(replica_id) for replica_id in ranking if replica_id in candidates]
        now = time.monotonic()
        self._leaving |= {replica.replica_id: now for replica in ranked if replica.replica_id in self._leaving}
        rest = [replica for replica in candidates.values() if replica.replica_id not in self._leaving]
        random.shuffle(rest)
        return [[replica] for replica in (*ranked, *rest)]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's list of running replicas has changed."""
        now = time.monotonic()
        listed = {replica.replica_id for replica in replicas}
        kept = {
            replica_id: replica
            for replica_id, replica in self.curr_replicas.items()
            if replica_id not in listed and now - self._leaving.get(replica_id, now) < _KEEP_LEAVING_S
        }
        self._leaving = {replica_id: self._leaving.get(replica_id, now) for replica_id in kept}
        super().update_replicas([*replicas, *kept.values()])
        self._tell()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """A call found a replica dead before Serve's list said so."""
        super().on_replica_actor_died(replica_id)
        self._leaving.pop(replica_id, None)
        self._tell()

    def _tell(self) -> None:
        deployment: Any = self._deployment_id
        running = frozenset(i.unique_id for i in self.curr_replicas if i not in self._leaving)
        tell_watcher(deployment.app_name, deployment.name, running)
