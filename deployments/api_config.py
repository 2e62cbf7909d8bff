"""Settings of the HTTP API alone; a part of `AppConfig`."""

import re

from pydantic import Field, field_validator

from llm.config import StrictModel


class CorsConfig(StrictModel):
    """Which web pages of other origins may use the API from a browser; none by default, and the server's own pages
    need none of this. With `*` and without API keys, any page that one opens in a browser can use this server."""

    allow_origins: tuple[str, ...] = ()
    """Such as `https://chat.example.com`; `*` for every origin."""
    allow_origin_regex: str | None = None
    """Origins that match this as a whole are allowed too, such as `https://.*[.]example[.]com`."""
    max_age_s: int = Field(default=600, ge=0)
    """How long browsers may keep in mind what is allowed."""

    @field_validator("allow_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ValueError(f"{origin!r} is not an origin: scheme and host without a path, or *")
        return origins

    @field_validator("allow_origin_regex")
    @classmethod
    def _check_regex(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        return pattern

    @property
    def is_on(self) -> bool:
        """Whether any other origin is allowed."""
        return bool(self.allow_origins) or self.allow_origin_regex is not None


class ResponsesConfig(StrictModel):
    """Responses of `/v1/responses` that are kept, unless a request says `store: false`: for `previous_response_id`,
    and to be read again. The bounds hold for all API keys together; the oldest responses go first."""

    path: str | None = None
    """File that they are kept in (SQLite, on no network file system), so that they outlast the server; None for memory.
    The router has it or, with several routers, a process of its own on one of their nodes."""
    max_responses: int = Field(default=10_000, ge=0)
    """0 to keep none."""
    max_bytes: int = Field(default=128 << 20, ge=1024)
