"""`Sums`: what was used by day, key, model and kind of refusal, in memory."""

import operator
from collections.abc import Iterable

from deployments.usage.entries import Entry, Spent, UsageQuery, UsageRow

_Place = tuple[str, str, str, str]


class Sums:
    """Adds up entries, each once however often it comes: a writer's entries come in order."""

    def __init__(self) -> None:
        self._rows: dict[_Place, list[int]] = {}
        self._last: dict[str, int] = {}
        self._tokens: dict[tuple[str, str], dict[str, int]] = {}

    def news(self, entries: Iterable[Entry]) -> list[Entry]:
        """Those that have not been added yet."""
        return [entry for entry in entries if entry.seq > self._last.get(entry.writer, 0)]

    def add(self, entries: Iterable[Entry]) -> None:
        """Add entries; no effect for those that have been added."""
        for entry in self.news(entries):
            self._last[entry.writer] = entry.seq
            self.count(entry)

    def count(self, entry: Entry) -> None:
        """Add an entry that certainly is new."""
        row = self._rows.setdefault((entry.day, entry.key, entry.model, entry.refusal), [0, 0, 0, 0])
        row[0] += entry.num_requests
        row[1] += entry.prompt_tokens
        row[2] += entry.cached_tokens
        row[3] += entry.output_tokens
        of_month = self._tokens.setdefault((entry.key, entry.day[:7]), {})
        of_month[entry.day] = of_month.get(entry.day, 0) + entry.num_tokens

    def rows(self, query: UsageQuery | None = None) -> list[UsageRow]:
        """What a query asks for, sorted; everything without one."""
        places = sorted(place for place in self._rows if _is_asked(place, query))
        if query is None or query.is_by_day:
            return [UsageRow(*place, *self._rows[place]) for place in places]
        together: dict[_Place, list[int]] = {}
        for place in places:
            row = together.setdefault(("", *place[1:]), [0, 0, 0, 0])
            row[:] = map(operator.add, row, self._rows[place])
        return [UsageRow(*place, *row) for place, row in sorted(together.items())]

    def spent(self, keys: Iterable[str], today: str) -> dict[str, Spent]:
        """What these keys have used of their budgets."""
        found = {}
        for key in keys:
            found[key] = Spent(today)
            for day, num_tokens in self._tokens.get((key, today[:7]), {}).items():
                found[key] = found[key].plus(num_tokens, day)
        return found


def _is_asked(place: _Place, query: UsageQuery | None) -> bool:
    if query is None:
        return True
    day, key, model, _ = place
    return query.first_day <= day <= query.last_day and query.key in (None, key) and query.model in (None, model)
