"""The accountant of several routers: a deployment with one replica, and the client through which routers call it."""

from typing import Any

import msgspec

from deployments.errors import AccountantAwayError
from deployments.router.accountant import Accountant
from deployments.router.leases import Ask, Reply
from deployments.serve.calls import call

_encode = msgspec.msgpack.Encoder().encode
_ask_decoder = msgspec.msgpack.Decoder(Ask)
_reply_decoder = msgspec.msgpack.Decoder(Reply)


class AccountantReplica:
    """An `Accountant` behind Ray Serve. Its state is only in memory; routers tell a new one what it needs.

    Args:
        num_routers: number of routers of the application.
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
        return _reply_decoder.decode(await call(self._exchange, _encode(ask), away=AccountantAwayError))
