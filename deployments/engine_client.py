"""How a router reaches the engine replicas."""

import asyncio
from typing import Any, Protocol

import msgspec

from deployments.engine_factory import EngineInfo
from llm.errors import LLMError

_info_decoder = msgspec.msgpack.Decoder(EngineInfo)


class ReplicaLostError(LLMError):
    """The replica that ran a call died or was taken away; another one may go on."""


class EngineClient(Protocol):
    """Calls to whichever replica is chosen for them."""

    async def describe(self) -> EngineInfo:
        """What the replicas have in common; waits until there is one.

        Raises:
            ReplicaLostError: try again.
        """
        ...

    async def generate(self, call: bytes) -> bytes:
        """Run an encoded `GenerateCall` on a replica and return the encoded reply. Cancelling aborts it there.

        Raises:
            ReplicaLostError: the replica is gone.
        """
        ...


class ServeEngineClient:
    """Calls through a Ray Serve deployment handle, which chooses the replica.

    Args:
        handle: of the `EngineReplica` deployment.
    """

    def __init__(self, handle: Any) -> None:
        self._describe = handle.describe
        self._generate = handle.generate

    async def describe(self) -> EngineInfo:
        """See `EngineClient`."""
        return _info_decoder.decode(await self._call(self._describe))

    async def generate(self, call: bytes) -> bytes:
        """See `EngineClient`."""
        return await self._call(self._generate, call)

    async def _call(self, method: Any, *args: bytes) -> bytes:
        import grpc  # type: ignore[import-untyped]
        from ray.exceptions import RayActorError

        response = method.remote(*args)
        try:
            reply: bytes = await response
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not task.cancelling():  # cancelled at the other end: the replica is being taken away
                raise ReplicaLostError("the replica gave the call up") from None
            response.cancel()
            raise
        except (RayActorError, grpc.RpcError) as error:
            raise ReplicaLostError(f"the replica is gone ({type(error).__name__})") from error
        return reply
