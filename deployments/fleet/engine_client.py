"""How a router reaches the engine replicas, whatever carries the calls."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from deployments.channel.messages import ChannelAddress, EngineInfo


@dataclass(frozen=True, slots=True)
class Starts:
    """How the starts of a model's replicas go.

    Attributes:
        num_starting: replicas that are being started and do not run yet.
        failure: why the latest start failed; None if none has failed since the fleet last grew, shrank or was well.
        has_failed_repeatedly: whether several starts in a row have failed.
    """

    num_starting: int = 0
    failure: str | None = None
    has_failed_repeatedly: bool = False

    @property
    def is_promising(self) -> bool:
        """Whether a replica is on its way, and nothing says that it will fail to start."""
        return self.num_starting > 0 and self.failure is None


class EngineClient(Protocol):
    """Calls to engine replicas. Each goes to the first replica of a ranking of ids that is there, or to any if none is.

    A replica that is being taken away still counts as there for calls that name it.
    """

    def watch(self, callback: Callable[[frozenset[str]], None]) -> None:
        """Report the ids of the running replicas whenever they change, on the caller's event loop."""
        ...

    async def wake(self) -> None:
        """Have a call wait for a replica: if the fleet is scaled to zero, this starts one.

        Raises:
            ReplicaLostError: try again.
        """
        ...

    async def replica_starts(self) -> Starts:
        """How the starts of replicas go."""
        ...

    async def attach(self, replica_id: str, channel: ChannelAddress) -> EngineInfo:
        """Have a replica report its state to this channel; returns what its engine is.

        Raises:
            ReplicaLostError: it is gone.
        """
        ...

    async def stay(self, replica_id: str, duration_s: float) -> None:
        """Have a replica that Ray Serve is taking away stay for this long; returns when the time is up.

        Raises:
            ReplicaLostError: it is gone.
        """
        ...

    async def tell_queue(self, replica_id: str, channel: ChannelAddress, num_tokens: int) -> None:
        """Tell a replica how many tokens this router holds back, for its autoscaling statistics.

        Raises:
            ReplicaLostError: it is gone.
        """
        ...

    async def forget_adapters(self, replica_id: str, digests: Sequence[str]) -> None:
        """Have a replica give up adapters as soon as none of its requests uses them.

        Raises:
            ReplicaLostError: it is gone.
        """
        ...

    async def generate(self, call: bytes, ranking: Sequence[str]) -> bytes:
        """Run an encoded `GenerateCall` on a replica and return the encoded reply. Cancelling aborts it there.

        Raises:
            ReplicaLostError: the replica is gone.
        """
        ...

    async def generate_batch(self, calls: bytes, ranking: Sequence[str]) -> bytes:
        """Run an encoded list of `GenerateCall`s on one replica and return the encoded list of replies once all have
        ended. Cancelling aborts them there.

        Raises:
            ReplicaLostError: the replica is gone.
        """
        ...


def is_being_cancelled() -> bool:
    """Whether the current task itself was cancelled, and not only what it waits for.

    Call this in an `except` block: with the task in a variable there, frame, task and exception would refer to each
    other and wait for the garbage collector.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
