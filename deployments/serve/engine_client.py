"""Calls to engine replicas through Ray Serve."""

import asyncio
import contextvars
from collections.abc import Callable, Sequence
from typing import Any

from deployments.channel.messages import ChannelAddress, EngineInfo, decode_info, encode
from deployments.errors import ReplicaLostError
from deployments.fleet.engine_client import Starts, is_being_cancelled
from deployments.serve.failures import end_of_actor, has_failed_repeatedly, start_failure
from deployments.serve.replica_list import watch_replicas

_STARTING_STATES = ("STARTING", "RECOVERING")


class ServeEngineClient:
    """Calls through a Ray Serve deployment handle; `RankedRequestRouter` reads the rankings.

    Args:
        handle: of the `EngineReplica` deployment.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        # Kept, because looking a method up makes a handle, which is slow for each request.
        self._generate = handle.generate
        self._generate_batch = handle.generate_batch

    def watch(self, callback: Callable[[frozenset[str]], None]) -> None:
        """See `EngineClient`."""
        loop = asyncio.get_running_loop()

        def on_change(replica_ids: frozenset[str]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(callback, replica_ids)

        watch_replicas(self._handle.app_name, self._handle.deployment_name, on_change)

    async def wake(self) -> None:
        """See `EngineClient`."""
        await self._call(self._handle.wake)

    async def replica_starts(self) -> Starts:
        """See `EngineClient`. Asks Serve's controller, which takes some milliseconds."""
        return await asyncio.to_thread(replica_starts, self._handle.app_name, self._handle.deployment_name)

    async def attach(self, replica_id: str, channel: ChannelAddress) -> EngineInfo:
        """See `EngineClient`."""
        return decode_info(await self._call(self._handle.attach, encode(channel), (replica_id,)))

    async def stay(self, replica_id: str, duration_s: float) -> None:
        """See `EngineClient`."""
        await self._call(self._handle.stay, duration_s, (replica_id,))

    async def tell_queue(self, replica_id: str, channel: ChannelAddress, num_tokens: int) -> None:
        """See `EngineClient`."""
        await self._call(self._handle.note_queue, channel.router_id, (replica_id,), num_tokens)

    async def forget_adapters(self, replica_id: str, digests: Sequence[str]) -> None:
        """See `EngineClient`."""
        await self._call(self._handle.forget_adapters, list(digests), (replica_id,))

    async def generate(self, call: bytes, ranking: Sequence[str]) -> bytes:
        """See `EngineClient`."""
        reply: bytes = await self._call(self._generate, call, tuple(ranking))
        return reply

    async def generate_batch(self, calls: bytes, ranking: Sequence[str]) -> bytes:
        """See `EngineClient`."""
        replies: bytes = await self._call(self._generate_batch, calls, tuple(ranking))
        return replies

    async def _call(self, method: Any, *args: object) -> Any:
        import grpc  # type: ignore[import-untyped]
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import DeploymentUnavailableError

        # Calls run outside the HTTP request's context. Inside it, Ray Serve would give all calls that request's id. It
        # finds waiting calls by that id, so it would lose all but one of those that wait at once. It would also cancel
        # them itself when the client leaves, which looks like a lost replica.
        response = contextvars.Context().run(method.remote, *args)
        try:
            return await response
        except asyncio.CancelledError:
            if not is_being_cancelled():  # canceled at the other end: the replica is being removed
                raise ReplicaLostError("the replica gave up the call") from None
            response.cancel()
            raise
        except DeploymentUnavailableError as error:
            raise ReplicaLostError("Ray Serve has given up starting replicas") from error
        except (RayActorError, grpc.RpcError) as error:
            raise ReplicaLostError(end_of_actor(str(error))) from error


def replica_starts(app_name: str, deployment_name: str) -> Starts:
    """How the starts of a deployment's replicas go, from Serve's status; blocks until Serve answers."""
    from ray import serve

    application = serve.status().applications.get(app_name)
    deployment = application.deployments.get(deployment_name) if application is not None else None
    if deployment is None:
        return Starts()
    num_starting = sum(deployment.replica_states.get(state, 0) for state in _STARTING_STATES)
    return Starts(num_starting, start_failure(deployment.message), has_failed_repeatedly(deployment.message))
