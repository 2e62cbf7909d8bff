"""Calls to engine replicas through Ray Serve."""

import asyncio
import contextvars
from collections.abc import Callable, Sequence
from typing import Any

from deployments.channel.messages import ChannelAddress, EngineInfo, decode_info, encode
from deployments.errors import ReplicaLostError
from deployments.fleet.engine_client import is_being_cancelled
from deployments.serve.replica_list import watch_replicas


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
        return decode_info(await self._call(self._describe))

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
