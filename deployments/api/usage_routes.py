"""What API keys have used: `/v1/usage` for the key itself, `/rayline/usage` for administrators."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from deployments.accounts_config import Role
from deployments.api.answering import json_response
from deployments.api.permissions import key_of, require_admin
from deployments.api.route_table import Route
from deployments.chat.errors import invalid
from deployments.router.access import Access
from deployments.router.keys import ApiKey
from deployments.usage.entries import Spent, UsageQuery, UsageRow

_MAX_DAYS = 366


class UsageSum(BaseModel):
    """Requests that were answered, their tokens, and refused requests by kind of error."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """How many of the prompt tokens came from the prefix cache."""
    output_tokens: int = 0
    refusals: dict[str, int] = {}


class PeriodUsage(UsageSum):
    """What was used in a time, in all and by model."""

    first_day: str
    last_day: str
    models: dict[str, UsageSum]


class Budget(BaseModel):
    """Tokens that a key may use in a day or a month."""

    limit: int
    used: int
    left: int
    renews_at: datetime


class KeyState(BaseModel):
    """A key that is valid now, and what is left of its budgets."""

    key: str
    role: Role
    models: list[str] | None
    """The models that it may use; null for all."""
    expires_at: datetime | None
    budgets: dict[str, Budget]
    """`tokens_per_day` and `tokens_per_month`, as far as the key has them."""


class KeyUsage(KeyState):
    """What the key of this request has used and may use; where there are no keys, all requests without one."""

    object: str = "usage"
    today: PeriodUsage
    this_month: PeriodUsage
    period: PeriodUsage | None = None
    """The days from the query's `from` to its `to`; null without them."""


class UsageLine(UsageSum):
    """A day's use of a model by a key, or that of all days of the report."""

    day: str | None
    """Null with `by=period`."""
    key: str
    model: str


class UsageReport(BaseModel):
    """Use by day, key and model, and in all."""

    object: str = "list"
    first_day: str
    last_day: str
    data: list[UsageLine]
    total: UsageSum
    keys: list[KeyState]


class UsageEndpoints:
    """Answers questions about usage, from the record of all routers.

    Args:
        access: knows keys, budgets and the record.
        model_name: the name under which a model is recorded, by that name or an alias; None for others.
    """

    def __init__(self, access: Access, model_name: Callable[[str], str | None] = lambda name: name) -> None:
        self._access = access
        self._model_name = model_name

    def table(self) -> list[Route]:
        """The routes of this class."""
        return [
            Route("GET", "/v1/usage", self.own, "What this key has used, and has left", KeyUsage),
            Route("GET", "/rayline/usage", self.everyone, "What all keys have used", UsageReport),
        ]

    async def own(self, request: Request) -> Response:
        """Report what the request's key has used today and this month, in UTC, and what is left of its budgets; and
        what it has used in a `period`, if the query says `from` or `to`, which are as in `/rayline/usage`."""
        query = _query(request, "from", "to")
        key = key_of(request)
        today = self._today()
        days = _days(query, today)
        first = today.replace(day=1)
        name = key.name if key is not None else ""
        rows = await self._access.meter.rows(UsageQuery(first.isoformat(), today.isoformat(), name))
        period = None
        if query:
            asked = UsageQuery(days[0].isoformat(), days[1].isoformat(), name)
            period = _period(await self._access.meter.rows(asked), *days)
        if key is not None and key.limits.has_budget:
            await self._access.meter.budgets.refresh(key.name)
        state = self._state(key) if key is not None else _NO_KEY
        usage = KeyUsage(
            **state.model_dump(),
            today=_period(rows, today, today),
            this_month=_period(rows, first, today),
            period=period,
        )
        return json_response(usage.model_dump(mode="json"))

    async def everyone(self, request: Request) -> Response:
        """Report what each key has used of each model, and has left of its budgets. The query's `from` and `to` are
        days in UTC, both included, by default this month until today; `key` and `model` leave out all others; `by` is
        `day`, or `period` for all days together."""
        require_admin(request)
        query = _query(request, "from", "to", "key", "model", "by")
        today = self._today()
        first, last = _days(query, today)
        by = query.get("by", "day")
        if by not in ("day", "period"):
            raise invalid("by: must be day or period", "by")
        model = query.get("model")
        model = (self._model_name(model) or model) if model is not None else None
        asked = UsageQuery(first.isoformat(), last.isoformat(), query.get("key"), model, by == "day")
        rows = await self._access.meter.rows(asked)
        keys = await self._states(query.get("key"), today)
        # In a thread: keys, models and days can be many.
        report = await asyncio.to_thread(lambda: _report(asked, rows, keys).model_dump_json())
        return Response(report, media_type="application/json")

    async def _states(self, name: str | None, today: date) -> list[KeyState]:
        """What the keys are, or the one of this name, and what is left of their budgets."""
        keys = [key for key in self._access.keys if name in (None, key.name)]
        recorded: dict[str, Spent] = {}
        if any(key.limits.has_budget for key in keys):
            of_day, of_month = [
                await self._tokens(UsageQuery(first.isoformat(), today.isoformat(), name, is_by_day=False))
                for first in (today, today.replace(day=1))
            ]
            recorded = {key.name: Spent(today.isoformat(), of_day[key.name], of_month[key.name]) for key in keys}
        return [self._state(key, recorded.get(key.name)) for key in keys]

    async def _tokens(self, query: UsageQuery) -> Counter[str]:
        """Tokens that count toward budgets, by key."""
        tokens: Counter[str] = Counter()
        for row in await self._access.meter.rows(query):
            tokens[row.key] += row.prompt_tokens + row.output_tokens
        return tokens

    def _state(self, key: ApiKey, recorded: Spent | None = None) -> KeyState:
        """A key and its budgets; see `Budgets.states`."""
        budgets = {
            state.name: Budget(
                limit=state.limit, used=state.used, left=max(0, state.limit - state.used), renews_at=state.renews_at
            )
            for state in self._access.meter.budgets.states(key, recorded)
        }
        return KeyState(
            key=key.name,
            role=key.role,
            models=sorted(key.models) or None,
            expires_at=datetime.fromtimestamp(key.expires_at, UTC) if key.expires_at is not None else None,
            budgets=budgets,
        )

    def _today(self) -> date:
        return datetime.fromtimestamp(self._access.clock(), UTC).date()


_NO_KEY = KeyState(key="", role=Role.ADMIN, models=None, expires_at=None, budgets={})
"""Whoever asks where there are no keys."""


def _report(query: UsageQuery, rows: Sequence[UsageRow], keys: list[KeyState]) -> UsageReport:
    by_place: dict[tuple[str, str, str], list[UsageRow]] = {}
    for row in sorted(rows, key=lambda row: (row.day, row.key, row.model)):
        by_place.setdefault((row.day, row.key, row.model), []).append(row)
    return UsageReport(
        first_day=query.first_day,
        last_day=query.last_day,
        data=[
            UsageLine(day=day or None, key=key, model=model, **_sum(some).model_dump())
            for (day, key, model), some in by_place.items()
        ],
        total=_sum(rows),
        keys=keys,
    )


def _query(request: Request, *names: str) -> dict[str, str]:
    """The parameters of a request's query.

    Raises:
        APIError: a 400; one is not among these names, or is there twice. To leave it out would answer another question.
    """
    query: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in names:
            raise invalid(f"{name[:80]}: unknown; the query may have {', '.join(names)}", name[:80])
        if name in query:
            raise invalid(f"{name}: is there twice", name)
        if "\0" in value:  # some databases cannot even compare it
            raise invalid(f"{name}: holds a NUL", name)
        query[name] = value
    return query


def _days(query: Mapping[str, str], today: date) -> tuple[date, date]:
    """The first and the last day that a query asks for.

    Raises:
        APIError: a 400.
    """
    last = _day(query.get("to"), "to", today)
    first = _day(query.get("from"), "from", min(today, last).replace(day=1))
    if not 0 <= (last - first).days < _MAX_DAYS:
        raise invalid(f"from: must be at most {_MAX_DAYS} days before `to`, and not after it", "from")
    return first, last


def _day(value: str | None, name: str, default: date) -> date:
    """A day of the query.

    Raises:
        APIError: a 400.
    """
    if value is None:
        return default
    try:
        return date.fromisoformat(value)
    except ValueError:
        raise invalid(f"{name}: must be a day such as 2030-01-31", name) from None


def _period(rows: Iterable[UsageRow], first: date, last: date) -> PeriodUsage:
    inside = [row for row in rows if first.isoformat() <= row.day <= last.isoformat()]
    models = {
        model: _sum([row for row in inside if row.model == model]) for model in sorted({row.model for row in inside})
    }
    return PeriodUsage(
        first_day=first.isoformat(), last_day=last.isoformat(), models=models, **_sum(inside).model_dump()
    )


def _sum(rows: Sequence[UsageRow]) -> UsageSum:
    refusals: dict[str, int] = {}
    served = [row for row in rows if not row.refusal]
    for row in rows:
        if row.refusal:
            refusals[row.refusal] = refusals.get(row.refusal, 0) + row.num_requests
    return UsageSum(
        requests=sum(row.num_requests for row in served),
        prompt_tokens=sum(row.prompt_tokens for row in served),
        cached_tokens=sum(row.cached_tokens for row in served),
        output_tokens=sum(row.output_tokens for row in served),
        refusals=refusals,
    )
