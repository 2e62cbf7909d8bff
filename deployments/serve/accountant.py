"""The accountant of several routers: a deployment of one replica, and how routers reach it."""

import asyncio
import contextvars
from typing import Any

import msgspec

from deployments.errors import AccountantAwayError
from deployments.fleet.engine_client import is_being_cancelled
from deployments.router.accountant import Accountant
from deployments.router.leases import Ask, Reply

_encode = msgspec.msgpack.Encoder().encode
_ask_decoder = msgspec.msgpack.Decoder(Ask)
_reply_decoder = msgspec.msgpack.Decoder(Reply)


class AccountantReplica:
    """An `Accountant` behind Ray Serve. What it knows lives in its memory; the routers tell a new one.

    Args:
        num_routers: routers of the application.
    """

    def __init__(self, num_routers: int) -> None:
        self._accountant = Accountant(num_routers)

    async def exchange(self, ask: bytes) -> bytes:
        """See `Accountant.exchange`; both sides encoded."""
        return _encode(self._accountant.exchange(_ask_decoder.decode(ask)))


class ServeAccountantClient:
    """`AccountantClient` through a Ray Serve deployment handle.

    Args:
        handle: of the `Accountant` deployment.
    """

    is_shared = True

    def __init__(self, handle: Any) -> None:
        self._exchange = handle.exchange

    async def exchange(self, ask: Ask) -> Reply:
        """See `AccountantClient`."""
        import grpc  # type: ignore[import-untyped]
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        # Outside any HTTP request's context, as in `ServeEngineClient`.
        response = contextvars.Context().run(self._exchange.remote, _encode(ask))
        try:
            return _reply_decoder.decode(await response)
        except asyncio.CancelledError:
            if not is_being_cancelled():  # but cancelled at the other end: the accountant is being taken away
                raise AccountantAwayError("it is being replaced") from None
            response.cancel()
            raise
        except (RayError, RayServeException, grpc.RpcError) as error:
            raise AccountantAwayError(f"it cannot be reached: {type(error).__name__}") from error
