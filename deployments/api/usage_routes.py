"""What API keys have used: `/v1/usage` for the key itself, `/rayline/usage` for administrators."""

from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, timedelta

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from deployments.accounts_config import Role
from deployments.api.answering import json_response
from deployments.api.permissions import key_of, require_admin
from deployments.api.route_table import Route
from deployments.chat.errors import invalid
from deployments.router.access import Access
from deployments.usage.entries import UsageQuery, UsageRow

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


class KeyUsage(BaseModel):
    """What the key of this request has used and may use."""

    object: str = "usage"
    key: str
    role: Role
    models: list[str] | None
    """The models that it may use; null for all."""
    expires_at: datetime | None
    today: PeriodUsage
    this_month: PeriodUsage
    budgets: dict[str, Budget]
    """`tokens_per_day` and `tokens_per_month`, as far as the key has them."""


class UsageLine(UsageSum):
    """A day's use of a model by a key."""

    day: str
    key: str
    model: str


class UsageReport(BaseModel):
    """Use by day, key and model, and in all."""

    object: str = "list"
    first_day: str
    last_day: str
    data: list[UsageLine]
    total: UsageSum


class UsageEndpoints:
    """Answers questions about usage, from the record of all routers.

    Args:
        access: knows keys, budgets and the record.
    """

    def __init__(self, access: Access) -> None:
        self._access = access

    def table(self) -> list[Route]:
        """The routes of this class."""
        return [
            Route("GET", "/v1/usage", self.own, "What this key has used, and has left", KeyUsage),
            Route("GET", "/rayline/usage", self.everyone, "What all keys have used", UsageReport),
        ]

    async def own(self, request: Request) -> Response:
        """Report what the request's key has used today and this month, in UTC, and what is left of its budgets."""
        key = key_of(request)
        today = self._today()
        first = today.replace(day=1)
        name = key.name if key is not None else ""
        rows = await self._access.meter.rows(UsageQuery(first.isoformat(), today.isoformat(), name))
        budgets = {}
        if key is not None and key.limits.has_budget:
            await self._access.meter.budgets.refresh(key.name)
            for state in self._access.meter.budgets.states(key):
                left = max(0, state.limit - state.used)
                budgets[state.name] = Budget(limit=state.limit, used=state.used, left=left, renews_at=state.renews_at)
        expires_at = datetime.fromtimestamp(key.expires_at, UTC) if key is not None and key.expires_at else None
        usage = KeyUsage(
            key=name,
            role=key.role if key is not None else Role.ADMIN,
            models=sorted(key.models) if key is not None and key.models else None,
            expires_at=expires_at,
            today=_period(rows, today, today),
            this_month=_period(rows, first, today),
            budgets=budgets,
        )
        return json_response(usage.model_dump(mode="json"))

    async def everyone(self, request: Request) -> Response:
        """Report what each key has used of each model, by day in UTC. The query's `from` and `to` are days, both
        included, by default this month until today; `key` and `model` leave out all others."""
        require_admin(request)
        query = request.query_params
        today = self._today()
        last = _day(query.get("to"), "to", today)
        first = _day(query.get("from"), "from", min(today, last).replace(day=1))
        if not first <= last < first + timedelta(days=_MAX_DAYS):
            raise invalid(f"from: must be at most {_MAX_DAYS} days before `to`, and not after it", "from")
        asked = UsageQuery(first.isoformat(), last.isoformat(), query.get("key"), query.get("model"))
        rows = await self._access.meter.rows(asked)
        places = sorted({(row.day, row.key, row.model) for row in rows})
        by_place: dict[tuple[str, str, str], list[UsageRow]] = {place: [] for place in places}
        for row in rows:
            by_place[row.day, row.key, row.model].append(row)
        report = UsageReport(
            first_day=asked.first_day,
            last_day=asked.last_day,
            data=[
                UsageLine(day=day, key=key, model=model, **_sum(some).model_dump())
                for (day, key, model), some in by_place.items()
            ],
            total=_sum(rows),
        )
        return json_response(report.model_dump(mode="json"))

    def _today(self) -> date:
        return datetime.fromtimestamp(self._access.clock(), UTC).date()


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
