"""What several routers share about API keys, their limits and the record of what they use: a deployment with one
replica, and the clients through which routers call it."""

from typing import Any

import msgspec

from deployments.errors import AccountantAwayError, RecordAwayError
from deployments.router.accountant import Accountant
from deployments.router.leases import Ask, Reply
from deployments.serve.calls import call
from deployments.usage.entries import Delivery, Receipt, UsageQuery, UsageRow
from deployments.usage.ledger import Ledger
from deployments.usage.place import RecordPlace

_encode = msgspec.msgpack.Encoder().encode
_decode_ask = msgspec.msgpack.Decoder(Ask).decode
_decode_reply = msgspec.msgpack.Decoder(Reply).decode
_decode_delivery = msgspec.msgpack.Decoder(Delivery).decode
_decode_receipt = msgspec.msgpack.Decoder(Receipt).decode
_decode_query = msgspec.msgpack.Decoder(UsageQuery).decode
_decode_rows = msgspec.msgpack.Decoder(list[UsageRow]).decode
_LEDGER_TIMEOUT_S = 10.0


class AccountantReplica:
    """An `Accountant` and a `Ledger` behind Ray Serve. What the accountant knows is only in memory; routers tell a new
    one what it needs.

    Args:
        num_routers: number of routers of the application.
        place: where the record of usage is.
    """

    def __init__(self, num_routers: int, place: RecordPlace) -> None:
        self._accountant = Accountant(num_routers)
        self._ledger = Ledger(place.record)

    async def exchange(self, ask: bytes) -> bytes:
        """See `Accountant.exchange`; both sides encoded."""
        return _encode(self._accountant.exchange(_decode_ask(ask)))

    async def deliver(self, delivery: bytes) -> bytes | None:
        """See `LedgerClient.deliver`; both sides encoded. None where the record cannot be reached."""
        try:
            return _encode(await self._ledger.deliver(_decode_delivery(delivery)))
        except RecordAwayError:
            return None

    async def rows(self, query: bytes) -> bytes | None:
        """See `LedgerClient.rows`; both sides encoded. None where the record cannot be reached."""
        try:
            return _encode(await self._ledger.rows(_decode_query(query)))
        except RecordAwayError:
            return None


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
        return _decode_reply(await call(self._exchange, _encode(ask), away=AccountantAwayError))


class ServeLedgerClient:
    """`LedgerClient` through a Ray Serve deployment handle.

    Args:
        handle: of the `Accountant` deployment.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def deliver(self, delivery: Delivery) -> Receipt:
        """See `LedgerClient`."""
        return _decode_receipt(await _answer(self._handle.deliver, _encode(delivery)))

    async def rows(self, query: UsageQuery) -> list[UsageRow]:
        """See `LedgerClient`."""
        return _decode_rows(await _answer(self._handle.rows, _encode(query)))


async def _answer(method: Any, data: bytes) -> bytes:
    answer: bytes | None = await call(method, data, away=RecordAwayError, timeout_s=_LEDGER_TIMEOUT_S)
    if answer is None:
        raise RecordAwayError("the accountant cannot reach the database or the file; its log says why")
    return answer
