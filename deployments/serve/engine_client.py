"""How a router reaches the engine replicas."""

import asyncio
import contextvars
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from deployments.channel.messages import ChannelAddress, encode
from deployments.errors import ReplicaLostError
from deployments.replica.engine_factory import EngineInfo
from deployments.serve.replica_list import watch_replicas

_info_decoder = msgspec.msgpack.Decoder(EngineInfo)


class EngineClient(Protocol):
    """Calls to engine replicas, each to the first of a ranking of replica ids that is there; to any, if none is."""

    def watch(self, callback: Callable[[frozenset[str]], None]) -> None:
        """Tell the ids of the running replicas whenever these change, on the event loop of the caller."""
        ...

    async def describe(self) -> EngineInfo:
        """What the replicas have in common; waits until there is one.

        Raises:
            ReplicaLostError: try again.
        """
        ...

    async def attach(self, replica_id: str, channel: ChannelAddress) -> None:
        """Have a replica report its state to this channel.

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

    async def embed(self, call: bytes, ranking: Sequence[str]) -> bytes:
        """Run an encoded `EmbedCall` on a replica and return the encoded reply.

        Raises:
            ReplicaLostError: the replica is gone.
        """
        ...


class ServeEngineClient:
    """Calls through a Ray Serve deployment handle; `RankedRequestRouter` reads the rankings.

    Args:
        handle: of the `EngineReplica` deployment.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._describe = handle.describe
        self._attach = handle.attach
        self._note_queue = handle.note_queue
        self._generate = handle.generate
        self._embed = handle.embed

    def watch(self, callback: Callable[[frozenset[str]], None]) -> None:
        """See `EngineClient`."""
        loop = asyncio.get_running_loop()

        def on_change(replica_ids: frozenset[str]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(callback, replica_ids)

        watch_replicas(self._handle.app_name, self._handle.deployment_name, on_change)

    async def describe(self) -> EngineInfo:
        """See `EngineClient`."""
        return _info_decoder.decode(await self._call(self._describe))

    async def attach(self, replica_id: str, channel: ChannelAddress) -> None:
        """See `EngineClient`."""
        await self._call(self._attach, encode(channel), (replica_id,))

    async def tell_queue(self, replica_id: str, channel: ChannelAddress, num_tokens: int) -> None:
        """See `EngineClient`."""
        await self._call(self._note_queue, channel.endpoint, (replica_id,), num_tokens)

    async def generate(self, call: bytes, ranking: Sequence[str]) -> bytes:
        """See `EngineClient`."""
        reply: bytes = await self._call(self._generate, call, tuple(ranking))
        return reply

    async def embed(self, call: bytes, ranking: Sequence[str]) -> bytes:
        """See `EngineClient`."""
        reply: bytes = await self._call(self._embed, call, tuple(ranking))
        return reply

    async def _call(self, method: Any, *args: object) -> Any:
        import grpc  # type: ignore[import-untyped]
        from ray.exceptions import RayActorError

        # Outside the HTTP request's context. In it Ray Serve would give all calls that request's id, by which it finds
        # those that wait for a replica, and lose all but one of those that wait at once; and cancel them itself when
        # the client leaves, which looks like a lost replica.
        response = contextvars.Context().run(method.remote, *args)
        try:
            return await response
        except asyncio.CancelledError:
            if not is_being_cancelled():  # but cancelled at the other end: the replica is being taken away
                raise ReplicaLostError("the replica gave the call up") from None
            response.cancel()
            raise
        except (RayActorError, grpc.RpcError) as error:
            raise ReplicaLostError(f"the replica is gone ({type(error).__name__})") from error


def is_being_cancelled() -> bool:
    """Whether it is the current task that somebody has cancelled, and not only what it waits for.

    To be asked in an `except`: with the task in a variable there, frame, task and exception would refer to each other,
    and wait for the garbage collector.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
