"""Settings of API keys and of the record of what they use; a part of `AppConfig`."""

from enum import StrEnum

from pydantic import Field

from llm.config import StrictModel

MIN_PRIORITY, MAX_PRIORITY = -100, 100
"""Bounds of a request's `priority`."""


class Role(StrEnum):
    """What an API key may do besides using models."""

    USER = "user"
    """See its own usage."""
    ADMIN = "admin"
    """See everyone's usage, and load and unload adapters."""


class KeyLimits(StrictModel):
    """How much one API key may ask of all routers together; None for no limit."""

    requests_per_min: int | None = Field(default=None, ge=1)
    tokens_per_min: int | None = Field(default=None, ge=1)
    """Tokens of prompts and answers per minute."""
    max_concurrent_requests: int | None = Field(default=None, ge=1)
    tokens_per_day: int | None = Field(default=None, ge=1)
    """Tokens of prompts and answers per day, from midnight to midnight in UTC. It needs `accounts.record`."""
    tokens_per_month: int | None = Field(default=None, ge=1)
    """Tokens of prompts and answers per calendar month in UTC. It needs `accounts.record`."""
    min_priority: int = Field(default=0, ge=MIN_PRIORITY, le=MAX_PRIORITY)
    """The lowest `priority` that requests may ask for; lower ones go first. If it is above 0, it is also the priority
    of requests that ask for none."""
    max_priority: int = Field(default=MAX_PRIORITY, ge=MIN_PRIORITY, le=MAX_PRIORITY)
    """The highest `priority` that requests may ask for. If it is below 0, it is also the priority of requests that ask
    for none."""

    @property
    def has_budget(self) -> bool:
        """Whether the tokens of a day or a month are limited."""
        return self.tokens_per_day is not None or self.tokens_per_month is not None


class AccountsConfig(StrictModel):
    """The record of what each API key uses: one entry for each request, with tokens and outcome, without any text."""

    record: str | None = None
    """Where the record is kept: a file ending in `.jsonl`, to which one JSON object a request is appended, or the URL
    of a database in SQLAlchemy's form, such as `sqlite:///usage.db` or `postgresql+psycopg://user@host/rayline`. None
    to count in memory only, until a restart; budgets need a record."""
    record_env: str | None = None
    """Environment variable that holds the URL instead, because Ray Serve writes a configuration's arguments to its log
    and a URL may hold a password; read when the application is deployed."""
    spool: str | None = None
    """Directory on each router's node where entries wait until the record has them, so that nothing is lost when a
    router is killed or the database cannot be reached. None for `$XDG_STATE_HOME/rayline` or `~/.local/state/rayline`;
    on Kubernetes, name a volume that outlives the pod. Without a record nothing is written."""
