"""`Dispatcher`: which replica a request goes to, when, and whether it is accepted at all."""

import math
import time
from collections.abc import Callable

from deployments.errors import NoReplicaError, OverloadedError
from deployments.fleet.fleet import Fleet
from deployments.fleet.work import Prospects
from deployments.model_config import AdmissionConfig
from deployments.router.waiting import Ticket, WaitingQueue
from llm.errors import EngineError, LLMError

_ROWS_AHEAD = 1.25
"""Requests that a replica may hold per row, so that the next ones are there when rows become free."""
_HOPELESS_AFTER_S = 0.5
"""News that a replica has ended, and that another one will replace it, takes a moment to arrive."""
_OUTDATED_AFTER_S = 3.0
"""A request that an outdated router could not begin for this long never will: the client should ask a new router."""
_SUSPECTS_A_REPLICA = 2
"""Suspects that a replica is sent at a time: one that it tries, and one that follows without a pause. The others wait
in the router, where they can still go to another replica."""
_RATE_WINDOW_S, _RATE_HALF_LIFE_S = 1.0, 10.0


class Dispatcher:
    """Holds requests back until a replica has room for them. Lives on the router's event loop.

    Args:
        fleet: this router's view of the replicas.
        config: how much may wait, and how long; may be changed.
        clock: seconds; monotonic.
    """

    def __init__(self, fleet: Fleet, config: AdmissionConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_refused = 0
        self._fleet = fleet
        self.config = config
        self._clock = clock
        self._waiting = WaitingQueue()
        self._trying: dict[str, set[int]] = {}
        self._rate = _Rate(clock)
        self._max_step_tokens = math.inf
        self._empty_since: float | None = clock()
        self._prospects = Prospects(frozenset(), is_one_coming=False)

    @property
    def num_waiting(self) -> int:
        """Requests that no replica has yet."""
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens to prefill for these requests."""
        return self._waiting.num_tokens

    def learn_step_tokens(self, max_step_tokens: int) -> None:
        """Set how many tokens an engine step computes at most; a replica is sent a few steps' worth ahead."""
        self._max_step_tokens = max_step_tokens

    def check(self, num_work_tokens: int, timeout_s: float | None = None) -> None:
        """Refuse new work that could not begin in time.

        Args:
            num_work_tokens: tokens of prompt and expected output.
            timeout_s: how long the client waits for the whole answer.

        Raises:
            OverloadedError: it could not; the client should come back later.
        """
        if not self._waiting:
            return
        waiting, pace = self._waiting.num_work_tokens + num_work_tokens, self._rate.tokens_per_s
        num_too_many = waiting - self.config.max_queue_tokens
        longest_wait_s = min(self.config.max_queue_s, timeout_s if timeout_s is not None else math.inf)
        late_s = waiting / pace - longest_wait_s if pace else 0.0  # unknown until requests have waited for a while
        if num_too_many > 0 or late_s > 0:
            self.num_refused += 1
            retry_after_s = max(1.0, late_s, num_too_many / pace if pace else 0.0)
            raise OverloadedError("The server is overloaded; try again later", retry_after_s)

    def enqueue(self, ticket: Ticket) -> None:
        """Have a request wait for a replica with room. `ticket.ranking` gets ids of replicas, best first, and the
        request counts toward the first of them until `Fleet.ended`; or it gets NoReplicaError if there is no replica
        for too long.
        """
        ticket.since = self._clock()
        self._waiting.push(ticket)
        self.pump()

    def withdraw(self, ticket: Ticket) -> None:
        """Stop waiting with a request, or trying it as a suspect. No effect if neither applies."""
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        self.clear(ticket.stream_id)

    def clear(self, stream_id: int) -> None:
        """Note that a suspect has proven harmless, so the next one may be tried. No effect on other requests."""
        for tried in self._trying.values():
            tried.discard(stream_id)

    def pump(self) -> None:
        """Send on the requests for which there is room now. Call this whenever the fleet has changed."""
        self._note_emptiness()
        while self._waiting and self._has_room():
            ticket = self._waiting.pop(self._has_target)
            if ticket is None:
                break
            self._send(ticket)
        self._rate.measure(bool(self._waiting))

    def tick(self, prospects: Prospects) -> None:
        """Give up requests that have waited too long for any replica to appear, and requests that every remaining
        replica has failed. Call this about once a second.
        """
        self._note_emptiness()
        self._prospects = prospects
        if prospects.starts.is_promising and self._empty_since is not None:
            self._empty_since = self._clock()
        for ticket in list(self._waiting):
            if self.is_hopeless(ticket.since):
                self._give_up(ticket, self.no_replica())
            elif self._has_nowhere_to_go(ticket):
                self._give_up(
                    ticket, EngineError("the engine replica failed, and no other one can continue the request")
                )

    def is_hopeless(self, since: float) -> bool:
        """Whether there has been no replica, and none starting, for too long for a request that has waited since
        then."""
        if self._empty_since is None:
            return False
        patience_s = self.config.no_replica_timeout_s
        if self._prospects.starts.has_failed_repeatedly:
            patience_s = 0.0
        elif self._prospects.is_outdated:
            patience_s = min(patience_s, _OUTDATED_AFTER_S)
        return self._clock() - max(since, self._empty_since) > patience_s

    def no_replica(self) -> NoReplicaError:
        """The error with which a hopeless request ends."""
        failure = self._prospects.starts.failure
        if failure is not None:
            return NoReplicaError(f"no engine replica could be started: {failure}")
        if self._prospects.is_outdated:
            return NoReplicaError("the server has just been updated to another model; try again")
        timeout_s = self.config.no_replica_timeout_s
        return NoReplicaError(f"no engine replica has been running or starting for {timeout_s:g} s")

    def _has_nowhere_to_go(self, ticket: Ticket) -> bool:
        """Whether all replicas that exist or will exist soon have failed a request."""
        prospects = self._prospects
        if prospects.starts.is_promising or not ticket.excluded or prospects.replica_ids - ticket.excluded:
            return False
        patience_s = self.config.no_replica_timeout_s if prospects.is_one_coming else _HOPELESS_AFTER_S
        return self._clock() - ticket.since > patience_s

    def _send(self, ticket: Ticket) -> None:
        """Let a request go to the best replica for it."""
        ranking = [replica_id for replica_id in self._fleet.rank(ticket.key) if replica_id not in ticket.excluded]
        chosen = next(replica_id for replica_id in ranking if self._takes(replica_id, ticket))
        ranking.remove(chosen)
        self._fleet.sent(chosen, ticket.stream_id, ticket.key)
        self._rate.add(ticket.num_work_tokens)
        if ticket.ranking.done():  # cancelled; its owner withdraws it
            return
        if ticket.is_suspect:
            self._trying.setdefault(chosen, set()).add(ticket.stream_id)
            ranking = []  # another replica may have enough of them
        ticket.ranking.set_result([chosen, *ranking])

    def _give_up(self, ticket: Ticket, error: LLMError) -> None:
        self._waiting.remove(ticket)
        if not ticket.ranking.done():
            ticket.ranking.set_exception(error)

    def _has_target(self, ticket: Ticket) -> bool:
        return any(self._takes(replica_id, ticket) for replica_id in self._fleet.replica_ids)

    def _takes(self, replica_id: str, ticket: Ticket) -> bool:
        """Whether a request may go to a replica now."""
        if replica_id in ticket.excluded:
            return False
        if ticket.is_suspect and len(self._trying.get(replica_id, ())) >= _SUSPECTS_A_REPLICA:
            return False
        return self._takes_more(replica_id)

    def _note_emptiness(self) -> None:
        if self._fleet.replica_ids:
            self._empty_since = None
        elif self._empty_since is None:
            self._empty_since = self._clock()

    def _has_room(self) -> bool:
        return any(self._takes_more(replica_id) for replica_id in self._fleet.replica_ids)

    def _takes_more(self, replica_id: str) -> bool:
        load = self._fleet.load(replica_id)
        most_tokens = self.config.max_backlog_steps * self._max_step_tokens
        return load.num_rows < load.max_rows * _ROWS_AHEAD and load.num_prefill_tokens < most_tokens


class _Rate:
    """Work begun per second while more was waiting: what the fleet can carry, as an exponential moving average."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.tokens_per_s = 0.0
        self._clock = clock
        self._since: float | None = None
        self._num_tokens = 0

    def measure(self, is_saturated: bool) -> None:
        """Say whether requests wait from now on."""
        if not is_saturated:
            self._since = None
        elif self._since is None:
            self._since, self._num_tokens = self._clock(), 0

    def add(self, num_tokens: int) -> None:
        """Note that some of the waiting work has been sent on."""
        if self._since is None:
            return
        self._num_tokens += num_tokens
        now = self._clock()
        elapsed = now - self._since
        if elapsed < _RATE_WINDOW_S:
            return
        weight = 0.5 ** (elapsed / _RATE_HALF_LIFE_S) if self.tokens_per_s else 0.0
        self.tokens_per_s = weight * self.tokens_per_s + (1 - weight) * self._num_tokens / elapsed
        self._since, self._num_tokens = now, 0
