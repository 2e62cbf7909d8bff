"""`Sums`: what was used by day, key, model and kind of refusal, in memory."""

import operator
from collections.abc import Iterable, Mapping

from deployments.usage.entries import Entry, Spent, UsageQuery, UsageRow

_Place = tuple[str, str, str]
"""Key, model and kind of refusal."""


class Sums:
    """Adds up entries, each once however often it comes: a writer's entries come in order."""

    def __init__(self) -> None:
        self._days: dict[str, dict[_Place, list[int]]] = {}
        self._last: dict[str, int] = {}
        self._tokens: dict[tuple[str, str], dict[str, int]] = {}

    def news(self, entries: Iterable[Entry]) -> list[Entry]:
        """Those that have not been added yet."""
        return [entry for entry in entries if entry.seq > self._last.get(entry.writer, 0)]

    def add(self, entries: Iterable[Entry]) -> None:
        """Add entries; no effect for those that have been added."""
        for entry in self.news(entries):
            self._last[entry.writer] = entry.seq
            self._count(entry)

    def _count(self, entry: Entry) -> None:
        row = self._days.setdefault(entry.day, {}).setdefault((entry.key, entry.model, entry.refusal), [0, 0, 0, 0])
        row[0] += entry.num_requests
        row[1] += entry.prompt_tokens
        row[2] += entry.cached_tokens
        row[3] += entry.output_tokens
        of_month = self._tokens.setdefault((entry.key, entry.day[:7]), {})
        of_month[entry.day] = of_month.get(entry.day, 0) + entry.num_tokens

    def rows(self, query: UsageQuery | None = None) -> list[UsageRow]:
        """What a query asks for, sorted; everything without one."""
        days = {
            day: {place: row for place, row in rows.items() if _is_asked(place, query)}
            for day, rows in self._days.items()
            if query is None or query.first_day <= day <= query.last_day
        }
        if query is not None and not query.is_by_day:
            days = {"": _together(days.values())}
        return [UsageRow(day, *place, *row) for day in sorted(days) for place, row in sorted(days[day].items())]

    def spent(self, keys: Iterable[str], today: str) -> dict[str, Spent]:
        """What these keys have used of their budgets."""
        found = {}
        for key in keys:
            found[key] = Spent(today)
            for day, num_tokens in self._tokens.get((key, today[:7]), {}).items():
                found[key] = found[key].plus(num_tokens, day)
        return found


def _is_asked(place: _Place, query: UsageQuery | None) -> bool:
    key, model, _ = place
    return query is None or (query.key in (None, key) and query.model in (None, model))


def _together(days: Iterable[Mapping[_Place, list[int]]]) -> dict[_Place, list[int]]:
    sums: dict[_Place, list[int]] = {}
    for rows in days:
        for place, row in rows.items():
            known = sums.setdefault(place, [0, 0, 0, 0])
            known[:] = map(operator.add, known, row)
    return sums
