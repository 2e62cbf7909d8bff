"""`Budgets`: what is left of the tokens that API keys may use in a day or a month, as one router knows it."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from deployments.config import AwayPolicy
from deployments.errors import AccountantAwayError
from deployments.router.accounts import Refusal
from deployments.router.keys import ApiKey
from deployments.router.pending import Pending
from deployments.usage.entries import Entry, Spent, day_of, moment

_FRESH_S = 1.0
"""How long a router relies on what the ledger has said."""
_PATIENCE_S = 2.0
_OF_INTEREST_S = 60.0
"""How long after its last request a router goes on asking about a key."""
QUOTA = "insufficient_quota"


@dataclass(frozen=True, slots=True)
class BudgetState:
    """One budget of a key.

    Attributes:
        name: the setting.
        limit, used: tokens.
        renews_at: when it begins again.
    """

    name: str
    limit: int
    used: int
    renews_at: datetime


class Budgets:
    """Knows what the ledger last said of each key, and what this router's requests have used since.

    A request may start while any tokens are left, so the last one may go beyond the budget, and so may requests that
    start in other routers within a second.

    Args:
        on_need: called when the ledger should be asked soon.
        when_away: what to do about keys of which nothing is known while the ledger cannot be reached.
        clock: seconds since 1970.

    Attributes:
        pending: what this router's requests have used and the record does not have yet.
        is_away: whether the ledger cannot be reached; `Courier` writes it.
    """

    def __init__(self, on_need: Callable[[], None], when_away: AwayPolicy, clock: Callable[[], float]) -> None:
        self.pending = Pending()
        self.is_away = False
        self._on_need = on_need
        self._when_away = when_away
        self._clock = clock
        self._spent: dict[str, Spent] = {}
        self._heard_at: dict[str, float] = {}
        self._asked_at: dict[str, float] = {}
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def has_waiting(self) -> bool:
        """Whether a request waits for what the ledger says."""
        return bool(self._waiting)

    @property
    def today(self) -> str:
        """The day in UTC."""
        return day_of(moment(self._clock()))

    def keys_of_interest(self) -> list[str]:
        """The keys to ask the ledger about."""
        now = time.monotonic()
        return [
            key
            for key, asked_at in self._asked_at.items()
            if now - asked_at < _OF_INTEREST_S or self.pending.of_day(key, self.today)
        ]

    def pending_today(self) -> dict[str, int]:
        """Tokens that are pending, of the keys of interest."""
        return {key: self.pending.of_day(key, self.today) for key in self.keys_of_interest()}

    def settle(self, entry: Entry) -> None:
        """Note that the record has an entry; what the ledger said before did not include it."""
        self.pending.settle(entry)
        spent = self._spent.get(entry.key)
        if spent is not None:
            self._spent[entry.key] = spent.on(max(spent.day, entry.day)).plus(entry.num_tokens, entry.day)

    def hear(self, spent: Mapping[str, Spent]) -> None:
        """Take in what the ledger says."""
        now = time.monotonic()
        self._spent.update(spent)
        self._heard_at.update(dict.fromkeys(spent, now))

    def wake_up(self) -> None:
        """Let the waiting requests go on: the ledger has answered, or cannot be reached."""
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)

    async def refusal(self, key: ApiKey) -> Refusal | None:
        """Why a key may not begin a request now; None if it may.

        Raises:
            AccountantAwayError: nothing is known, the ledger cannot be reached, and requests are to be refused then.
        """
        if not key.limits.has_budget:
            return None
        await self.refresh(key.name)
        if key.name not in self._spent and self._when_away is AwayPolicy.CLOSED:
            raise AccountantAwayError("The budget of this API key cannot be checked now; try again in a few seconds")
        used_up = [state for state in self.states(key) if state.used >= state.limit]
        if not used_up:
            return None
        worst = max(used_up, key=lambda state: state.renews_at)
        period = worst.name.removeprefix("tokens_per_")
        wait_s = max(1.0, worst.renews_at.timestamp() - self._clock())
        message = (
            f"You exceeded your current quota: this API key may use {worst.limit} tokens a {period}, and has used "
            f"{worst.used}. It renews at {worst.renews_at.isoformat()}"
        )
        return Refusal(QUOTA, message, wait_s, code=QUOTA)

    def states(self, key: ApiKey, recorded: Spent | None = None) -> list[BudgetState]:
        """Every budget of a key, as far as this router knows.

        Args:
            key: the key.
            recorded: what the record has just said of it; None for what the ledger last said, which includes what other
                routers' requests have used that are not recorded yet.
        """
        now = moment(self._clock())
        today = day_of(now)
        known = recorded or self._spent.get(key.name, Spent(today))
        spent = self.pending.added_to(known.on(today), key.name)
        midnight = datetime.combine(now.date(), datetime.min.time(), UTC)
        next_month = (midnight.replace(day=1) + timedelta(days=32)).replace(day=1)
        budgets = (
            ("tokens_per_day", key.limits.tokens_per_day, spent.day_tokens, midnight + timedelta(days=1)),
            ("tokens_per_month", key.limits.tokens_per_month, spent.month_tokens, next_month),
        )
        return [BudgetState(name, limit, used, at) for name, limit, used, at in budgets if limit is not None]

    async def refresh(self, key: str) -> None:
        """Have the ledger say what a key has used, unless it has just said so."""
        now = time.monotonic()
        self._asked_at[key] = now
        if now - self._heard_at.get(key, -_FRESH_S) < _FRESH_S or self.is_away:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self._on_need()
        await asyncio.wait({waiter}, timeout=_PATIENCE_S)
