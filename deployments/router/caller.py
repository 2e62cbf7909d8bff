"""What the router needs to know about the sender of an HTTP request."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from deployments.router.accounts import Account
from deployments.router.metered_request import Sheet

if TYPE_CHECKING:
    from opentelemetry.trace import Span


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, and how urgent it is.

    Attributes:
        tenant: whose share the request counts toward; "" if there are no keys.
        priority: lower goes first.
        timeout_s: how long the client waits for the whole answer; None for as long as it takes.
        received_at: when the HTTP request arrived, by the monotonic clock; None for now.
        account: where its tokens are counted; None if there are no keys.
        key_digest: digest of the secret that it came with; empty if there are no keys.
        span: the HTTP request's span in its trace; None if there are no traces.
        request_id: the HTTP request's `X-Request-ID`, for the log.
        session_id: the client's name for the conversation that the request belongs to; "" if it gives none. Two API
            keys may use the same name for different sessions.
        sheet: where the work that the request begins is noted.
    """

    tenant: str = ""
    priority: int = 0
    timeout_s: float | None = None
    received_at: float | None = None
    account: Account | None = None
    key_digest: bytes = b""
    span: "Span | None" = None
    request_id: str = ""
    session_id: str = ""
    sheet: Sheet = field(default_factory=Sheet)
