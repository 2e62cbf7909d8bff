"""`Courier`: brings a router's entries from its spool to the ledger, and back what the ledger says of budgets."""

import asyncio
import logging
import uuid
from contextlib import suppress
from pathlib import Path

from deployments.errors import RecordAwayError
from deployments.router.budgets import Budgets
from deployments.usage.entries import Delivery
from deployments.usage.ledger import LedgerClient
from deployments.usage.spool import Spool, orphans

logger = logging.getLogger("ray.serve")

_BUSY_INTERVAL_S, _SHORTEST_INTERVAL_S, _AWAY_INTERVAL_S = 0.25, 0.02, 1.0
_ORPHANS_INTERVAL_S = 5.0


class Courier:
    """Lives on its router's event loop.

    While the ledger cannot be reached, entries wait in the spool, and streams do not.

    Args:
        spool: holds this router's entries.
        directory: holds the spools of this node's routers; None where nothing is written.
        ledger: takes the entries.
        budgets: is told what the ledger says.
    """

    def __init__(self, spool: Spool, directory: Path | None, ledger: LedgerClient, budgets: Budgets) -> None:
        self._spool = spool
        self._directory = directory
        self._ledger = ledger
        self._budgets = budgets
        self._router_id = uuid.uuid4().hex
        self._need = asyncio.Event()
        self._turn = asyncio.Lock()
        self._delivering: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None

    def hurry(self) -> None:
        """Deliver soon."""
        self._need.set()

    def start(self) -> None:
        """Begin to deliver, and to look for what other routers of this node have left. No effect if it has begun."""
        if self._delivering is None:
            self._delivering = asyncio.create_task(self._deliver_for_ever())
            if self._directory is not None:
                self._looking = asyncio.create_task(self._deliver_orphans_for_ever(self._directory))

    def stop_looking(self) -> None:
        """Look no longer for what other routers of this node have left."""
        if self._looking is not None:
            self._looking.cancel()

    def close(self) -> None:
        """Stop."""
        self.stop_looking()
        if self._delivering is not None:
            self._delivering.cancel()

    async def deliver_all(self) -> None:
        """Deliver everything that the spool holds now.

        Raises:
            RecordAwayError: the ledger does not take it.
        """
        async with self._turn:
            await self._deliver()
            while self._spool.batch():
                await self._deliver()

    async def _deliver(self) -> None:
        """Deliver one batch, and hear about budgets."""
        entries = self._spool.batch()
        budgets = self._budgets
        pending = budgets.pending_today()
        for entry in entries:
            if entry.key in pending and entry.day == budgets.today:
                pending[entry.key] -= entry.num_tokens
        delivery = Delivery(self._router_id, entries, pending, list(pending))
        try:
            receipt = await self._ledger.deliver(delivery)
        except RecordAwayError as error:
            self._note_away(error)
            raise
        if budgets.is_away:
            logger.info("the record of usage is back")
            budgets.is_away = False
        self._spool.drop_batch()
        for entry in entries:
            budgets.settle(entry)
        budgets.hear(receipt.spent)

    async def _deliver_for_ever(self) -> None:
        was_pending: dict[str, int] = {}
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_AWAY_INTERVAL_S if self._budgets.is_away else _BUSY_INTERVAL_S):
                    await self._need.wait()
            self._need.clear()
            pending = self._budgets.pending_today()
            is_changed, was_pending = pending != was_pending, pending
            if is_changed or self._budgets.has_waiting or self._budgets.is_away or self._spool.batch():
                try:
                    await self.deliver_all()
                except RecordAwayError:
                    await asyncio.sleep(_AWAY_INTERVAL_S)
                except Exception as error:
                    logger.exception("usage cannot be delivered to its record")
                    self._note_away(error)
                    await asyncio.sleep(_AWAY_INTERVAL_S)
                self._budgets.wake_up()
            await asyncio.sleep(_SHORTEST_INTERVAL_S)

    async def _deliver_orphans_for_ever(self, directory: Path) -> None:
        while True:
            try:
                await self._deliver_orphans(directory)
            except RecordAwayError:
                pass  # they stay where they are
            except Exception:
                logger.exception("usage that an earlier router left in %s cannot be delivered", directory)
            await asyncio.sleep(_ORPHANS_INTERVAL_S)

    async def _deliver_orphans(self, directory: Path) -> None:
        found = await asyncio.to_thread(lambda: list(orphans(directory)))
        num_entries = 0
        try:
            for spool in found:
                while entries := spool.batch():
                    await self._ledger.deliver(Delivery(f"{self._router_id}-for-{spool.writer}", entries, {}, []))
                    spool.drop_batch()
                    num_entries += len(entries)
        finally:
            for spool in found:
                spool.close()
            if num_entries:
                logger.info("%d entries of usage that an earlier router left have been recorded", num_entries)

    def _note_away(self, error: Exception) -> None:
        if not self._budgets.is_away:
            logger.warning("the record of usage is away (%s); entries wait on this node", error)
        self._budgets.is_away = True
        self._budgets.wake_up()
