"""What a generation sees of its surroundings: those that answer the same HTTP request, and the way to the replicas."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from deployments.channel.messages import ChannelAddress
from deployments.fleet.engine_client import EngineClient
from deployments.router.batch import CallBatches
from deployments.router.caller import Caller
from deployments.router.suspicion import Part
from deployments.router.waiting import Ticket

GenerationT = TypeVar("GenerationT", contravariant=True)


class Siblings(Protocol[GenerationT]):
    """The generations that answer the same HTTP request, as one of them sees the group."""

    @property
    def caller(self) -> Caller:
        """Who sent the HTTP request."""
        ...

    def wake_up(self, generation: GenerationT) -> None:
        """Tell the group's reader that a generation has news."""
        ...

    @property
    def batches(self) -> CallBatches:
        """Takes the calls of those that are pooled."""
        ...

    def must_wait(self, generation: GenerationT) -> bool:
        """Whether the generation lets others go first."""
        ...

    async def wait_for_turn(self, generation: GenerationT) -> None:
        """Wait for those that go first: they are many, or one of them prefills the generation's prompt."""
        ...

    def note_begun(self, generation: GenerationT) -> None:
        """The generation has its first token, or never will."""
        ...

    def block_hashes(self, generation: GenerationT) -> Sequence[int]:
        """What the replicas' reports call the full pages of the generation's prompt."""
        ...


class Placement(Protocol[GenerationT]):
    """How a generation gets to the engine replicas."""

    @property
    def client(self) -> EngineClient:
        """Calls the replicas."""
        ...

    @property
    def channel(self) -> ChannelAddress | None:
        """Where tokens come in; None to live on replies alone."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of the model version that requests are made for."""
        ...

    @property
    def max_resumes(self) -> int:
        """How often a request may go on elsewhere after a failure."""
        ...

    def claim(self, generation: GenerationT) -> Ticket:
        """Begin an attempt: a number for its tokens, and a place among those that wait for a replica."""
        ...

    def release(self, generation: GenerationT, ticket: Ticket) -> None:
        """End an attempt."""
        ...

    def note_failure(self, generation: GenerationT, replica_id: str, why: str) -> Part:
        """A replica has failed while it had the generation.

        Args:
            generation: what it had.
            replica_id: which replica.
            why: in a sentence about the replica.

        Returns:
            What the generation had to do with it.
        """
        ...

    def note_move(self, replica_id: str | None, *, is_failure: bool) -> None:
        """A stream of this replica goes on elsewhere."""
        ...

    def note_over(self, generation: GenerationT) -> None:
        """The generation is over, in whatever way."""
        ...
