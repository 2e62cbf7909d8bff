"""What a router's requests and its view of the fleet are to each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from deployments.channel.messages import EngineInfo


@dataclass(frozen=True, slots=True)
class Prospects:
    """Where requests may hope to go.

    Attributes:
        replica_ids: replicas of the router's version that serve, or may serve soon.
        is_one_coming: whether another one is to replace one that failed, or is missing.
        is_starting: whether Ray Serve says that one is being started that may be of the router's version.
        is_outdated: whether an update has left the router behind: no replica of its version is left, and none comes.
    """

    replica_ids: frozenset[str]
    is_one_coming: bool
    is_starting: bool = False
    is_outdated: bool = False


class Work(Protocol):
    """A router's requests, as far as they depend on the fleet."""

    @property
    def num_waiting(self) -> int:
        """Requests that no replica has yet."""
        ...

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens that these have to prefill."""
        ...

    def fleet_changed(self) -> None:
        """Send on what has room now."""
        ...

    @property
    def is_engine_wanted(self) -> bool:
        """Whether any request waits for a replica to start or to say what its engine is."""
        ...

    def learn(self, info: EngineInfo) -> None:
        """A replica has said what its engine is."""
        ...

    def tick(self, prospects: Prospects) -> None:
        """Give up what has waited too long, or waits for nothing; called a few times a second."""
        ...

    def note_arrivals(self, stream_ids: Sequence[int]) -> None:
        """Streams have arrived at the replica that they were sent to."""
        ...

    def is_on(self, replica_id: str) -> bool:
        """Whether any request runs on a replica."""
        ...

    def move_streams(self, replica_id: str, why: str, *, is_failure: bool) -> None:
        """Have what runs on a replica go on elsewhere, if failover is on.

        Args:
            replica_id: where it runs.
            why: in a sentence about the replica.
            is_failure: the replica failed; else it is being taken away.
        """
        ...
