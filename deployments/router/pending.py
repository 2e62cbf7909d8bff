"""`Pending`: tokens that a router's requests have used and that the record does not have yet."""

from collections import Counter

from deployments.usage.entries import Entry, Spent


class Pending:
    """By key: of requests that run, and by day of requests that have ended. `Meter` and `Courier` write it."""

    def __init__(self) -> None:
        self._running: Counter[str] = Counter()
        self._ended: dict[str, Counter[str]] = {}

    def run(self, key: str, num_tokens: int) -> None:
        """Count tokens of a request that runs."""
        self._running[key] += num_tokens

    def end(self, entry: Entry, num_counted: int) -> None:
        """A request has ended, of which so many tokens have been counted as running."""
        self._running[entry.key] -= num_counted
        if not self._running[entry.key]:
            del self._running[entry.key]
        self._ended.setdefault(entry.key, Counter())[entry.day] += entry.num_tokens

    def settle(self, entry: Entry) -> None:
        """The record has an entry."""
        days = self._ended.get(entry.key, Counter())
        days[entry.day] -= entry.num_tokens
        if not days[entry.day]:
            del days[entry.day]
        if not days:
            self._ended.pop(entry.key, None)

    def of_day(self, key: str, day: str) -> int:
        """A key's tokens that count toward a day's budget."""
        return self._running[key] + self._ended.get(key, Counter())[day]

    def added_to(self, spent: Spent, key: str) -> Spent:
        """What a key has spent, as the record says, and these."""
        of_month = sum(num for day, num in self._ended.get(key, Counter()).items() if day[:7] == spent.day[:7])
        return Spent(
            spent.day,
            spent.day_tokens + self.of_day(key, spent.day),
            spent.month_tokens + self._running[key] + of_month,
        )
