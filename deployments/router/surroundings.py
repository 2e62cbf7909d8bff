"""What a generation sees around it: the other generations of the same HTTP request, and the way to the replicas."""

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
        """Sends the calls of requests that give vectors."""
        ...

    def must_wait(self, generation: GenerationT) -> bool:
        """Whether the generation must let others go first."""
        ...

    async def wait_for_turn(self, generation: GenerationT) -> None:
        """Wait for the generation that prefills this one's prompt, if another one does."""
        ...

    def note_begun(self, generation: GenerationT) -> None:
        """Note that the generation has its first token, or never will."""
        ...

    def note_tokens(self, num_tokens: int) -> None:
        """Count tokens that the generation has got."""
        ...

    def note_over(self) -> None:
        """Note that the generation's task has ended."""
        ...

    def block_hashes(self, generation: GenerationT) -> Sequence[int]:
        """The hashes by which replicas' reports name the full pages of the generation's prompt."""
        ...


class Placement(Protocol[GenerationT]):
    """How a generation gets to the engine replicas."""

    @property
    def client(self) -> EngineClient:
        """Calls the replicas."""
        ...

    @property
    def channel(self) -> ChannelAddress | None:
        """Where tokens arrive; None to rely only on replies."""
        ...

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the model version that requests are made for."""
        ...

    @property
    def max_resumes(self) -> int:
        """How often a request may continue elsewhere after a failure."""
        ...

    def claim(self, generation: GenerationT) -> Ticket:
        """Begin an attempt: get a number for its tokens, and a place in the queue for a replica."""
        ...

    def release(self, generation: GenerationT, ticket: Ticket) -> None:
        """End an attempt."""
        ...

    def note_failure(self, generation: GenerationT, replica_id: str, why: str) -> Part:
        """Note that a replica has failed while it had the generation.

        Args:
            generation: the generation that it had.
            replica_id: the replica.
            why: the reason, in a sentence about the replica.

        Returns:
            What the generation had to do with the failure.
        """
        ...

    def note_move(self, replica_id: str | None, *, is_failure: bool) -> None:
        """Note that a stream of this replica continues elsewhere."""
        ...

    def note_over(self, generation: GenerationT) -> None:
        """Note that the generation has ended, in whatever way."""
        ...
