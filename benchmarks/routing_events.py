"""Routers and replicas of `benchmarks.routing_sim`, event by event."""

import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.routing_replica import Outcome, ReplicaSpeed, SimulatedReplica, SimulatedRequest
from benchmarks.routing_trace import BLOCK_TOKENS, TraceRequest
from deployments.config import PolicyName
from deployments.fleet.fleet import Fleet, RoutingKey
from deployments.fleet.policy import make_policy

REPORT_INTERVAL_S = 0.1
CALL_DELAY_S = 2.5e-3
"""From a router's choice to the replica's queue: a call through a Ray Serve handle."""
MESSAGE_DELAY_S = 1e-3
"""From a replica to a router through the token channel."""


class Simulation:
    """A trace through routers and replicas.

    Attributes:
        replicas, requests: what became of them.
        decision_s: how long each choice of a replica took, in this process.
        open_s: for each replica, the time that its requests spent there, added up.
        now: the simulated clock, in seconds.

    Args:
        trace: in order of arrival.
        policy: of every router.
        num_replicas: how many.
        num_routers: how many; requests go to them in turn.
        speed: of each replica.
        time_scale: arrival times are multiplied by this.
        seed: of the policies.

    Raises:
        ValueError: a request is larger than a replica's memory.
    """

    def __init__(
        self,
        trace: Sequence[TraceRequest],
        *,
        policy: PolicyName,
        num_replicas: int,
        num_routers: int = 1,
        speed: ReplicaSpeed,
        time_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        most = max(request.num_prompt_tokens + request.num_output_tokens for request in trace)
        if most > speed.num_slots // BLOCK_TOKENS * BLOCK_TOKENS:
            raise ValueError(f"a request of {most} tokens does not fit into a replica's {speed.num_slots} slots")
        self.replicas = [SimulatedReplica(speed) for _ in range(num_replicas)]
        self.requests = [SimulatedRequest(r, i, i % num_routers) for i, r in enumerate(trace)]
        self.decision_s: list[float] = []
        self.open_s = [0.0] * num_replicas
        self.now = 0.0
        self._fleets = [Fleet(make_policy(policy, seed + i)) for i in range(num_routers)]
        self._time_scale = time_scale
        self._received: list[list[list[int]]] = [[[] for _ in self._fleets] for _ in self.replicas]
        self._has_tick = [False] * num_replicas
        self._is_report_due = [False] * num_replicas
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = itertools.count()

    def run(self) -> None:
        """Until every request has ended."""
        for index in range(len(self.replicas)):
            self._report(index, delay_s=0.0)
        for request in self.requests:
            self._at(request.request.arrival_s * self._time_scale, self._arrive, request)
        while self._events:
            self.now, _, action, args = heapq.heappop(self._events)
            action(*args)

    def _at(self, when: float, action: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._events, (when, next(self._sequence), action, args))

    def _arrive(self, request: SimulatedRequest) -> None:
        """A request reaches its router."""
        fleet, trace = self._fleets[request.router], request.request
        key = RoutingKey(trace.num_prompt_tokens, trace.block_hashes)
        start = time.perf_counter()
        replica_id = fleet.rank(key)[0]
        self.decision_s.append(time.perf_counter() - start)
        fleet.sent(replica_id, request.stream_id, key)
        self._at(self.now + CALL_DELAY_S, self._deliver, int(replica_id), request)

    def _deliver(self, index: int, request: SimulatedRequest) -> None:
        """A request reaches its replica."""
        replica = self.replicas[index]
        plan = replica.plan
        replica.add(request, self.now)
        self._received[index][request.router].append(request.stream_id)
        self.open_s[index] -= self.now
        if replica.plan is not None and replica.plan is not plan:
            self._at(replica.plan.end_s, self._end_steps, index, replica.plan)
        self._start_steps(index)
        self._note_change(index)

    def _start_steps(self, index: int) -> None:
        plan = self.replicas[index].start(self.now)
        if plan is not None:
            self._at(plan.end_s, self._end_steps, index, plan)

    def _end_steps(self, index: int, plan: object) -> None:
        replica = self.replicas[index]
        if replica.plan is not plan:  # a new request has cut it short; that end has its own event
            return
        outcome = replica.finish()
        self.open_s[index] += self.now * len(outcome.ended)
        if outcome.begun or outcome.ended:
            self._at(self.now + MESSAGE_DELAY_S, self._tell, outcome)
        if self._is_report_due[index]:
            self._report(index)
        self._start_steps(index)
        self._note_change(index)

    def _tell(self, outcome: Outcome) -> None:
        """First and last tokens reach the routers."""
        for request in outcome.begun:
            self._fleets[request.router].prefilled(request.stream_id)
        for request in outcome.ended:
            self._fleets[request.router].ended(request.stream_id)

    def _note_change(self, index: int) -> None:
        """A replica's next report is not the same as its last one: have it sent when it is due.

        Replicas report at different times, as they would.
        """
        if not self._has_tick[index]:
            self._has_tick[index] = True
            offset = index / len(self.replicas)
            num_ticks = int(self.now / REPORT_INTERVAL_S - offset) + 1
            self._at((num_ticks + offset) * REPORT_INTERVAL_S, self._tick, index)

    def _tick(self, index: int) -> None:
        self._has_tick[index] = False
        plan = self.replicas[index].plan
        if plan is not None and plan.chunks:  # an engine reports between two steps, and this one takes a while
            self._is_report_due[index] = True
        else:
            self._report(index)

    def _report(self, index: int, delay_s: float = MESSAGE_DELAY_S) -> None:
        self._is_report_due[index] = False
        replica = self.replicas[index]
        stats, changes = replica.stats(), replica.pool.take_changes()
        for fleet, received in zip(self._fleets, self._received[index], strict=True):
            args = (str(index), stats, changes.added, changes.removed, False, tuple(received))
            received.clear()
            self._at(self.now + delay_s, fleet.report, *args)
