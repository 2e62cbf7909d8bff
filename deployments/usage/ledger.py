"""`Ledger`: the one place of an application that writes to its record and knows what all routers have used."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from deployments.errors import RecordAwayError
from deployments.usage.database_record import DatabaseRecord
from deployments.usage.entries import Delivery, Receipt, UsageQuery, UsageRow, day_of, moment
from deployments.usage.json_lines_record import JsonLinesRecord
from deployments.usage.record import MemoryRecord, Record

T = TypeVar("T")

logger = logging.getLogger("ray.serve")

JSON_LINES_SUFFIX = ".jsonl"
_ROUTER_FORGOTTEN_S = 10.0
_TIMEOUT_S = 8.0


class LedgerClient(Protocol):
    """How a router reaches the ledger."""

    async def deliver(self, delivery: Delivery) -> Receipt:
        """Record entries, and learn what keys have used.

        Raises:
            RecordAwayError: the record does not have them; deliver them again.
        """
        ...

    async def rows(self, query: UsageQuery) -> list[UsageRow]:
        """What the record says of all routers.

        Raises:
            RecordAwayError: it cannot be reached now.
        """
        ...


class Ledger:
    """A `LedgerClient` that owns the record.

    Args:
        record: what `open_record` takes.
        clock: seconds since 1970.

    Raises:
        ConfigError: the record cannot be used; one line with the fix.
    """

    def __init__(self, record: str | None, clock: Callable[[], float] = time.time) -> None:
        self._record = open_record(record)
        self._clock = clock
        self._is_closed = False
        self._pending: dict[str, tuple[float, dict[str, int]]] = {}
        # One thread, so that a database that hangs holds up no event loop, and no two calls meet.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="usage-record")

    async def deliver(self, delivery: Delivery) -> Receipt:
        """See `LedgerClient`."""
        now = self._clock()
        today = day_of(moment(now))

        def work() -> Receipt:
            self._record.append(delivery.entries)
            return Receipt(self._record.spent(delivery.keys, today) if delivery.keys else {})

        receipt = await self._call(work)
        self._pending[delivery.router_id] = now, delivery.pending
        others = [
            pending
            for router_id, (heard_at, pending) in self._pending.items()
            if router_id != delivery.router_id and now - heard_at < _ROUTER_FORGOTTEN_S
        ]
        spent = {
            key: spent.plus(sum(pending.get(key, 0) for pending in others)) for key, spent in receipt.spent.items()
        }
        return Receipt(spent)

    async def rows(self, query: UsageQuery) -> list[UsageRow]:
        """See `LedgerClient`."""
        return await self._call(lambda: self._record.rows(query))

    def close(self) -> None:
        """Let go of the record. From now on it is away: what is delivered stays with whoever delivers it."""
        if not self._is_closed:
            self._is_closed = True
            self._thread.submit(self._record.close)
            self._thread.shutdown(wait=False)

    async def _call(self, work: Callable[[], T]) -> T:
        if self._is_closed:
            raise RecordAwayError("it is closed")
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except TimeoutError:
            raise RecordAwayError(f"the record did not answer within {_TIMEOUT_S:g} s") from None


def open_record(record: str | None) -> Record:
    """The record that a configuration names.

    Args:
        record: path of a file of JSON lines, SQLAlchemy's URL of a database, or None for memory.

    Raises:
        ConfigError: it cannot be used; one line with the fix.
    """
    if record is None:
        return MemoryRecord()
    if record.endswith(JSON_LINES_SUFFIX) and "://" not in record:
        return JsonLinesRecord(Path(record))
    return DatabaseRecord(record)
