"""Where entries are kept for good: the interface of every record, and the record that is in memory only."""

from collections.abc import Sequence
from typing import Protocol

from deployments.usage.entries import Entry, Spent, UsageQuery, UsageRow
from deployments.usage.sums import Sums


class Record(Protocol):
    """Keeps entries. Its methods may block, and are called from one thread at a time.

    Raises:
        RecordAwayError: any of the methods, if the record cannot be reached now.
    """

    def append(self, entries: Sequence[Entry]) -> None:
        """Keep one writer's entries, in order. No effect for those that it has already."""
        ...

    def rows(self, query: UsageQuery) -> list[UsageRow]:
        """What was used, by day, key, model and kind of refusal."""
        ...

    def spent(self, keys: Sequence[str], today: str) -> dict[str, Spent]:
        """What these keys have used today and this month."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...


class MemoryRecord:
    """A `Record` that lasts as long as its process; it keeps sums."""

    def __init__(self) -> None:
        self._sums = Sums()

    def append(self, entries: Sequence[Entry]) -> None:
        """See `Record`."""
        self._sums.add(entries)

    def rows(self, query: UsageQuery) -> list[UsageRow]:
        """See `Record`."""
        return self._sums.rows(query)

    def spent(self, keys: Sequence[str], today: str) -> dict[str, Spent]:
        """See `Record`."""
        return self._sums.spent(keys, today)

    def close(self) -> None:
        """See `Record`."""
