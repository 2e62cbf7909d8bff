"""`Meter`: counts what the requests of one router use."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from deployments.config import AwayPolicy
from deployments.observe.usage_counts import UNKNOWN, UsageCounts
from deployments.router.budgets import Budgets
from deployments.router.courier import Courier
from deployments.router.metered_request import MeteredRequest, Sheet
from deployments.usage.entries import KILLED, REFUSED, Entry, UsageQuery, UsageRow, moment
from deployments.usage.ledger import Ledger, LedgerClient
from deployments.usage.place import RecordPlace
from deployments.usage.spool import FileSpool, MemorySpool, Spool

_TALLY_S = 5.0
"""How long refusals of one kind are counted together before they become an entry."""


class _Tally:
    """Refused requests of one key, model and reason, which become one entry."""

    def __init__(self, entry: Entry, number: int | None) -> None:
        self.entry = entry
        self.number = number
        self.num_requests = 0


class Meter:
    """Lives on its router's event loop, on which it must be created.

    Args:
        place: where the record is, and where entries wait.
        ledger: owns the record for all routers; None if this router is the only one and owns it.
        when_away: what to do about budgets while the ledger cannot be reached.
        clock: seconds since 1970.

    Attributes:
        counts: everything since the router started, for its metrics.
        budgets: what keys have left.

    Raises:
        ConfigError: the record or the spool cannot be used.
    """

    def __init__(
        self,
        place: RecordPlace | None = None,
        ledger: LedgerClient | None = None,
        when_away: AwayPolicy = AwayPolicy.OPEN,
        clock: Callable[[], float] = time.time,
    ) -> None:
        place = place or RecordPlace()
        self.counts = UsageCounts()
        self._clock = clock
        self._own = Ledger(place.record, clock) if ledger is None else None
        self._ledger: LedgerClient = ledger or self._own  # type: ignore[assignment]
        directory = Path(place.spool) if place.spool is not None else None
        self._spool: Spool = FileSpool.create(directory) if directory is not None else MemorySpool()
        self.budgets = Budgets(self._hurry, when_away, clock)
        self._courier = Courier(self._spool, directory, self._ledger, self.budgets)
        self._seq = self._num_opened = 0
        self._tallies: dict[tuple[str, str, str], _Tally] = {}
        self._end_of_tallies: asyncio.TimerHandle | None = None
        if directory is not None:
            self._courier.start()

    def open(self, key: str, sheet: Sheet, num_prompt_tokens: int) -> MeteredRequest:
        """Begin to count what a request uses; it must be closed.

        Args:
            key: name of its API key; "" where there are no keys.
            sheet: what is known of the request; the metered request is added to it.
            num_prompt_tokens: tokens of its prompts.
        """
        now = self._clock()
        entry = self._entry(now, key, sheet.model, KILLED)
        entry = msgspec.structs.replace(entry, request_id=sheet.request_id, prompt_tokens=num_prompt_tokens)
        request = MeteredRequest(self, entry, self._spool.open(entry, now))
        sheet.metered.append(request)
        self.budgets.pending.run(key, num_prompt_tokens)
        return request

    def refuse(self, key: str | None, model: str, reason: str) -> None:
        """Count a request that was answered with an error before any work began.

        Args:
            key: name of its API key; None if it brought no known one.
            model: name of the model that it asked for, if there is such a model; otherwise "".
            reason: kind of error, one of a few.
        """
        self.counts.count(UNKNOWN if key is None else key, model, reason, num_requests=1)
        if key is None:
            return
        now = self._clock()
        tally = self._tallies.get((key, model, reason))
        if tally is None:
            entry = msgspec.structs.replace(self._entry(now, key, model, REFUSED), reason=reason, num_requests=0)
            tally = self._tallies[key, model, reason] = _Tally(entry, self._spool.open(entry, now))
        tally.num_requests += 1
        if tally.number is not None:
            self._spool.note(tally.number, tally.num_requests, now)
        if self._end_of_tallies is None:
            self._end_of_tallies = asyncio.get_running_loop().call_later(_TALLY_S, self._end_tallies)

    def note_output(self, request: MeteredRequest, num_tokens: int) -> None:
        """See `RequestMeter`."""
        self.budgets.pending.run(request.entry.key, num_tokens)
        if request.number is not None:
            self._spool.note(request.number, request.num_output_tokens, self._clock())

    def note_end(self, request: MeteredRequest) -> None:
        """See `RequestMeter`. The entry is safe from the death of this process once this returns."""
        entry = request.entry = self._add(request.entry, request.number)
        self.budgets.pending.end(entry, request.num_counted)
        self.counts.count(
            entry.key,
            entry.model,
            num_requests=1,
            prompt_tokens=entry.prompt_tokens,
            cached_tokens=entry.cached_tokens,
            output_tokens=entry.output_tokens,
        )

    async def rows(self, query: UsageQuery) -> list[UsageRow]:
        """What is recorded of all routers, with everything that this one has counted.

        Raises:
            RecordAwayError: the record cannot be reached now.
        """
        self._end_tallies()
        await self._courier.deliver_all()
        return await self._ledger.rows(query)

    def stop_looking(self) -> None:
        """Look no longer for what other routers have left; what this one counts is still delivered."""
        self._courier.stop_looking()

    def close(self) -> None:
        """Stop. Another router of this node delivers what is left."""
        self._end_tallies()
        self._courier.close()
        self._spool.close()
        if self._own is not None:
            self._own.close()

    def _entry(self, now: float, key: str, model: str, outcome: str) -> Entry:
        """What is recorded of a request if the router is killed before it ends."""
        self._num_opened += 1
        return Entry(
            writer=self._spool.writer,
            seq=self._seq,
            opened=self._num_opened,
            at=moment(now),
            key=key,
            model=model,
            outcome=outcome,
        )

    def _add(self, entry: Entry, number: int | None) -> Entry:
        """Have an entry recorded, under the next number and with the present time."""
        self._seq += 1
        entry = msgspec.structs.replace(entry, seq=self._seq, at=moment(self._clock()))
        self._spool.add(entry, number)
        self._hurry()
        return entry

    def _end_tallies(self) -> None:
        if self._end_of_tallies is not None:
            self._end_of_tallies.cancel()
            self._end_of_tallies = None
        tallies, self._tallies = self._tallies, {}
        for tally in tallies.values():
            self._add(msgspec.structs.replace(tally.entry, num_requests=tally.num_requests), tally.number)

    def _hurry(self) -> None:
        self._courier.start()
        self._courier.hurry()
