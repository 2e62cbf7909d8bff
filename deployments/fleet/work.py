"""How a router's requests and its view of the fleet see each other."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from deployments.channel.messages import EngineInfo
from deployments.fleet.engine_client import Starts


@dataclass(frozen=True, slots=True)
class Prospects:
    """Where requests can expect to go.

    Attributes:
        replica_ids: replicas of the router's version that serve, or may serve soon.
        is_one_coming: whether a replica will replace one that failed or is missing.
        starts: what Ray Serve says about replicas that are being started and may be of the router's version.
        is_outdated: whether an update has left the router behind: no replica of its version is left or will join.
    """

    replica_ids: frozenset[str]
    is_one_coming: bool
    starts: Starts = field(default_factory=Starts)
    is_outdated: bool = False


class Work(Protocol):
    """A router's requests, as far as they depend on the fleet."""

    @property
    def num_waiting(self) -> int:
        """Number of requests that no replica has yet."""
        ...

    @property
    def num_waiting_tokens(self) -> int:
        """Number of tokens to prefill for these requests."""
        ...

    def fleet_changed(self) -> None:
        """Send on the requests for which there is room now."""
        ...

    @property
    def is_engine_wanted(self) -> bool:
        """Whether any request waits for a replica to start or to report its engine."""
        ...

    def learn(self, info: EngineInfo) -> None:
        """Take in what a replica says about its engine."""
        ...

    def tick(self, prospects: Prospects) -> None:
        """Give up requests that have waited too long or in vain; called a few times a second."""
        ...

    def note_arrivals(self, stream_ids: Sequence[int]) -> None:
        """Note that streams have arrived at the replica that they were sent to."""
        ...

    def is_on(self, replica_id: str) -> bool:
        """Whether any request runs on a replica."""
        ...

    def move_streams(self, replica_id: str, why: str, *, is_failure: bool) -> None:
        """Have the requests on a replica continue elsewhere, if failover is on.

        Args:
            replica_id: where they run.
            why: the reason, in a sentence about the replica.
            is_failure: the replica failed; otherwise it is being taken away.
        """
        ...
