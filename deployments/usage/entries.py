"""What is recorded of each request, and the sums that are asked for. Never a prompt, an answer or a key."""

from datetime import UTC, datetime

import msgspec

REFUSED = "refused"
"""Outcome of entries that count requests which were answered with an error before any work began."""
KILLED = "killed"
"""Outcome of requests whose router was killed before they ended."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One request that has ended, or several that were refused for the same reason.

    Attributes:
        writer: id of the spool that the entry comes from; a router has one for as long as it lives.
        seq: place among the writer's entries, rising from 1. Together they name the entry, however often it is sent.
        opened: number that the request got from its writer when it began.
        at: when it ended, in UTC.
        key: name of the API key; "" where there are no keys.
        model: name of the model or the adapter.
        request_id: the HTTP request's `X-Request-ID`.
        outcome: `stop`, `length`, `abort`, `error`, `killed` or `refused`.
        reason: kind of error; "" if there was none.
        num_requests: number of requests; above 1 for refusals alone.
        prompt_tokens: as the answer counts them.
        cached_tokens: how many of those came from the prefix cache.
        output_tokens: as the answer counts them; what was generated until then if it did not end in good order.
        duration_s: seconds from the request's arrival to its end; 0 for refusals and where a router was killed.
    """

    writer: str
    seq: int
    opened: int = 0
    at: datetime
    key: str
    model: str
    request_id: str = ""
    outcome: str
    reason: str = ""
    num_requests: int = 1
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    duration_s: float = 0.0

    @property
    def day(self) -> str:
        """The day in UTC, such as `2030-01-31`."""
        return day_of(self.at)

    @property
    def refusal(self) -> str:
        """Why it was refused; "" if it was not."""
        return self.reason if self.outcome == REFUSED else ""

    @property
    def num_tokens(self) -> int:
        """Tokens that count toward a budget."""
        return self.prompt_tokens + self.output_tokens


class UsageRow(msgspec.Struct, frozen=True, array_like=True):
    """A day's use of a model by a key, or that of several days.

    Attributes:
        day: as in `Entry.day`; "" for all days of a query together.
        refusal: "" for requests that began; otherwise the row counts refused ones, and this says why.
    """

    day: str
    key: str
    model: str
    refusal: str
    num_requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


class UsageQuery(msgspec.Struct, frozen=True, array_like=True):
    """What to count: whole days, in UTC, the last one included; None for every key or every model."""

    first_day: str
    last_day: str
    key: str | None = None
    model: str | None = None
    is_by_day: bool = True
    """False to count all days together."""


class Spent(msgspec.Struct, frozen=True, array_like=True):
    """Tokens that count toward a key's budgets.

    Attributes:
        day: the day of `day_tokens`, whose month is that of `month_tokens`.
    """

    day: str
    day_tokens: int = 0
    month_tokens: int = 0

    def on(self, day: str) -> "Spent":
        """The same on another day: a new day begins at 0, and so does a new month."""
        if day == self.day:
            return self
        return Spent(day, 0, self.month_tokens if day[:7] == self.day[:7] else 0)

    def plus(self, num_tokens: int, day: str | None = None) -> "Spent":
        """With that many tokens more, used on the same day, or on another one, which may be of another month."""
        of_day = num_tokens if day in (None, self.day) else 0
        of_month = num_tokens if day is None or day[:7] == self.day[:7] else 0
        return Spent(self.day, self.day_tokens + of_day, self.month_tokens + of_month)


class Delivery(msgspec.Struct, frozen=True, array_like=True):
    """What a router tells the ledger.

    Attributes:
        router_id: the router.
        entries: entries of one writer, in order.
        pending: tokens that this router's requests have used so far and that the record does not have, by key, the
            delivered entries left out.
        keys: the keys whose budgets the router wants to know about.
    """

    router_id: str
    entries: list[Entry]
    pending: dict[str, int]
    keys: list[str]


class Receipt(msgspec.Struct, frozen=True, array_like=True):
    """What the ledger answers: the record has the entries. By key, what is recorded, and pending at other routers."""

    spent: dict[str, Spent]


def day_of(at: datetime) -> str:
    """The day of a moment in UTC, such as `2030-01-31`."""
    return at.astimezone(UTC).date().isoformat()


def moment(seconds: float) -> datetime:
    """A moment from seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC)
