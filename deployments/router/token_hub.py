"""`TokenHub`: one token channel for all models of a router process."""

from collections.abc import Sequence
from typing import Any, Protocol

from deployments.channel.listener import ChannelCounters, TokenListener
from deployments.channel.messages import ChannelAddress, Report, TokenItem

_MOST_OWNERS = 4096
"""Replicas whose model is remembered; beyond this, it is looked up again."""


class TokenTaker(Protocol):
    """A model's router, as the hub sees it."""

    def knows(self, replica_id: str) -> bool:
        """Whether this is a replica of the model."""
        ...

    def take_items(self, replica_id: str, items: Sequence[TokenItem]) -> None:
        """Take in a replica's tokens."""
        ...

    def take_report(self, report: Report) -> None:
        """Take in a replica's state."""
        ...

    def use_channel(self, channel: ChannelAddress) -> None:
        """Have replicas send to this address from now on."""
        ...


class TokenHub:
    """Owns the listener, and hands on what each replica sends to the router of its model.

    Create it on the event loop that it is to run on.

    Args:
        host: address to listen on.
        port: the port; 0 for any free one.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.host = host
        self._takers: list[TokenTaker] = []
        self._owners: dict[str, TokenTaker] = {}
        self._listener = TokenListener(host, port, on_items=self._take_items, on_report=self._take_report)

    @property
    def address(self) -> ChannelAddress:
        """Where replicas send to."""
        return self._listener.address

    @property
    def counters(self) -> ChannelCounters:
        """What the listener has seen since it was opened."""
        return self._listener.counters

    def join(self, taker: TokenTaker) -> None:
        """Hand on what replicas of this model send."""
        self._takers.append(taker)

    def listen_on(self, host: str) -> None:
        """Have replicas send tokens to this address of this node from now on."""
        self.host = host
        address = self._listener.listen_on(host)
        for taker in self._takers:
            taker.use_channel(address)

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()

    def _owner(self, replica_id: str) -> TokenTaker | None:
        """The router of the replica's model; None for a replica that none of them has heard of."""
        owner = self._owners.get(replica_id)
        if owner is None:
            owner = next((taker for taker in self._takers if taker.knows(replica_id)), None)
            if owner is None:
                return None
            if len(self._owners) >= _MOST_OWNERS:
                self._owners.clear()
            self._owners[replica_id] = owner
        return owner

    def _take_items(self, replica_id: str, items: list[Any]) -> None:
        owner = self._owner(replica_id)
        if owner is not None:
            owner.take_items(replica_id, items)

    def _take_report(self, report: Report) -> None:
        owner = self._owner(report.replica_id)
        if owner is not None:
            owner.take_report(report)
