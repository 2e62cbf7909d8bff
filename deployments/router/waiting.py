"""Requests that wait in a router for a replica with room, and which of them is next."""

import asyncio
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from deployments.fleet.fleet import RoutingKey


@dataclass(slots=True, eq=False)
class Ticket:
    """A request's claim on a replica.

    Attributes:
        stream_id: the router's number for this attempt.
        key: what it is routed by; its tokens are the prompt, and what an earlier replica generated.
        num_work_tokens: the tokens of `key` plus the expected output.
        num_output_tokens: how many of the tokens of `key` were generated.
        tenant: whose share it counts toward; "" if there are no keys.
        priority: lower goes first.
        is_resumed: it has already been on a replica.
        is_suspect: a replica failed while the request ran on it.
        excluded: replicas that it must not go to because they failed it.
        since: when it began to wait, by the monotonic clock.
        ranking: gets the replicas to send it to, best first.
    """

    stream_id: int
    key: RoutingKey
    num_work_tokens: int
    tenant: str = ""
    priority: int = 0
    num_output_tokens: int = 0
    is_resumed: bool = False
    is_suspect: bool = False
    excluded: frozenset[str] = frozenset()
    since: float = 0.0
    ranking: "asyncio.Future[list[str]]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class _FairShare:
    """Tickets of one priority: each tenant's in order of arrival, and tenants by the work they have had so far.

    Start-time fair queueing (Goyal et al. 1996): a tenant's clock advances by the work that it is given, the smallest
    clock is next, and a tenant that returns after a pause starts at the present, without credit for the pause.
    """

    def __init__(self) -> None:
        self._tickets: dict[str, deque[Ticket]] = {}
        self._clocks: dict[str, float] = {}
        self._now = 0.0

    def __iter__(self) -> Iterator[Ticket]:
        for tickets in self._tickets.values():
            yield from tickets

    def __bool__(self) -> bool:
        return bool(self._tickets)

    def push(self, ticket: Ticket) -> None:
        if ticket.tenant not in self._tickets:
            self._tickets[ticket.tenant] = deque()
            self._clocks[ticket.tenant] = max(self._clocks.get(ticket.tenant, 0.0), self._now)
        self._tickets[ticket.tenant].append(ticket)

    def pop(self) -> Ticket:
        tenant = min(self._tickets, key=self._clocks.__getitem__)
        ticket = self._tickets[tenant].popleft()
        self._now = self._clocks[tenant]
        self._clocks[tenant] += ticket.num_work_tokens
        if not self._tickets[tenant]:
            del self._tickets[tenant]
            self._forget_the_past()
        return ticket

    def remove(self, ticket: Ticket) -> None:
        tickets = self._tickets[ticket.tenant]
        tickets.remove(ticket)
        if not tickets:
            del self._tickets[ticket.tenant]

    def _forget_the_past(self) -> None:
        """Forget tenants without tickets whose clock is behind: they would start at the present anyway."""
        for tenant, clock in list(self._clocks.items()):
            if clock <= self._now and tenant not in self._tickets:
                del self._clocks[tenant]


class WaitingQueue:
    """Resumed requests first, then by priority, then fair among tenants, then in order of arrival.

    Among the resumed requests, suspects come last, those with the fewest tokens first. A request that brings down a
    replica usually does so with its prompt or its first tokens, and the sooner it is found, the fewer other requests it
    disturbs again.
    """

    def __init__(self) -> None:
        self.num_work_tokens = 0
        self.num_tokens = 0
        self._resumed: list[Ticket] = []
        self._levels: dict[int, _FairShare] = {}
        self._waiting: set[int] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, ticket: object) -> bool:
        return isinstance(ticket, Ticket) and ticket.stream_id in self._waiting

    def __iter__(self) -> Iterator[Ticket]:
        """All waiting tickets, in no particular order."""
        yield from self._resumed
        for level in self._levels.values():
            yield from level

    def push(self, ticket: Ticket) -> None:
        """Add a ticket."""
        self._waiting.add(ticket.stream_id)
        if ticket.is_resumed:
            insort(self._resumed, ticket, key=_resumed_order)
        else:
            self._levels.setdefault(ticket.priority, _FairShare()).push(ticket)
        self._count(ticket, 1)

    def pop(self, fits: Callable[[Ticket], bool] = lambda _: True) -> Ticket | None:
        """Take the next ticket; None if nothing that fits is waiting.

        Args:
            fits: whether a resumed request can be sent now. All other requests fit, or none does.
        """
        for ticket in self._resumed:
            if fits(ticket):
                self.remove(ticket)
                return ticket
        if not self._levels:
            return None
        level = min(self._levels)
        if not fits(next(iter(self._levels[level]))):
            return None
        ticket = self._levels[level].pop()
        self._forget(ticket)
        return ticket

    def remove(self, ticket: Ticket) -> None:
        """Remove a waiting ticket."""
        if ticket.is_resumed:
            self._resumed.remove(ticket)
        else:
            self._levels[ticket.priority].remove(ticket)
        self._forget(ticket)

    def _forget(self, ticket: Ticket) -> None:
        if ticket.priority in self._levels and not self._levels[ticket.priority]:
            del self._levels[ticket.priority]
        self._waiting.remove(ticket.stream_id)
        self._count(ticket, -1)

    def _count(self, ticket: Ticket, sign: int) -> None:
        self.num_tokens += sign * ticket.key.num_tokens
        self.num_work_tokens += sign * ticket.num_work_tokens


def _resumed_order(ticket: Ticket) -> tuple[bool, int, int]:
    return ticket.is_suspect, ticket.num_output_tokens if ticket.is_suspect else 0, ticket.stream_id
