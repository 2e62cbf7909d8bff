"""How a router reaches the engine replicas, whatever carries the calls."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from deployments.channel.messages import ChannelAddress, EngineInfo


class EngineClient(Protocol):
    """Calls to engine replicas, each to the first of a ranking of replica ids that is there; to any, if none is.

    A replica that is being taken away is there for those that name it.
    """

    def watch(self, callback: Callable[[frozenset[str]], None]) -> None:
        """Tell the ids of the running replicas whenever these change, on the event loop of the caller."""
        ...

    async def wake(self) -> None:
        """Have a call wait for a replica: where the fleet is scaled to zero, one starts because of it.

        Raises:
            ReplicaLostError: try again.
        """
        ...

    async def num_starting(self) -> int:
        """Number of replicas that are being started and do not run yet."""
        ...

    async def attach(self, replica_id: str, channel: ChannelAddress) -> EngineInfo:
        """Have a replica report its state to this channel; returns what it is.

        Raises:
            ReplicaLostError: it is gone.
        """
        ...

    async def stay(self, replica_id: str, duration_s: float) -> None:
        """Have a replica that Ray Serve is taking away stay for so long; returns when that is over.

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

    async def generate(self, call: bytes, ranking: Sequence[str]) -> bytes:
        """Run an encoded `GenerateCall` on a replica and return the encoded reply. Cancelling aborts it there.

        Raises:
            ReplicaLostError: the replica is gone.
        """
        ...

    async def generate_batch(self, calls: bytes, ranking: Sequence[str]) -> bytes:
        """Run an encoded list of `GenerateCall`s on one replica and return the encoded list of replies once all are
        over. Cancelling aborts them there.

        Raises:
            ReplicaLostError: the replica is gone.
        """
        ...


def is_being_cancelled() -> bool:
    """Whether it is the current task that somebody has cancelled, and not only what it waits for.

    To be asked in an `except`: with the task in a variable there, frame, task and exception would refer to each other,
    and wait for the garbage collector.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
