"""Who sent a request, how urgent it is and how long the client waits: what its headers say besides its body."""

import math
import uuid
from collections.abc import MutableMapping
from typing import Any

from starlette.requests import Request

from deployments.accounts_config import MAX_PRIORITY
from deployments.api.on_behalf import behalf_of
from deployments.chat.errors import invalid
from deployments.chat.requests import MAX_SESSION_CHARS
from deployments.chat.wire_model import RequestBody
from deployments.router.accounts import Account
from deployments.router.caller import Caller
from deployments.router.metered_request import Sheet

SESSION_HEADER = "X-Session-Id"
TIMEOUT_HEADER = "X-Request-Timeout"
REQUEST_ID_HEADER = "X-Request-ID"
"""Ray Serve takes the client's value or makes one, and returns it with the answer."""
TIMING_HEADER = "X-Rayline-Timing"


def caller_of(request: Request, priority: int | None = None, session_key: str | None = None) -> Caller:
    """What the router needs to know about the client.

    Args:
        request: the HTTP request.
        priority: the one that its body asks for.
        session_key: the `prompt_cache_key` in its body.

    Raises:
        APIError: a 400; the timeout is not a positive number, this API key may not use the priority, or the name of the
            session is too long.
    """
    state = request.scope.get("state", {})
    is_batch = behalf_of(request.scope) is not None
    sheet = sheet_of(request.scope)
    sheet.request_id = request.headers.get(REQUEST_ID_HEADER, "")[:128]
    return Caller(
        tenant=state.get("tenant", ""),
        priority=MAX_PRIORITY if is_batch else _priority(priority, state.get("account")),
        timeout_s=_timeout_s(request.headers.get(TIMEOUT_HEADER)),
        received_at=state.get("received_at"),
        account=state.get("account"),
        key_digest=state.get("key_digest", b""),
        span=state.get("span"),
        request_id=sheet.request_id,
        session_id=session_of(request, session_key),
        sheet=sheet,
    )


def version_key_of(request: Request, body: RequestBody) -> str:
    """What the request has in common with others that should be answered by the same version of a model: its session;
    without one its API key; without keys nothing, so it is the request's own id.

    Raises:
        APIError: as in `session_of`.
    """
    session = session_of(request, getattr(body, "prompt_cache_key", None))
    if session:
        return f"{tenant_of(request)}\0{session}"
    return tenant_of(request) or request.headers.get(REQUEST_ID_HEADER) or uuid.uuid4().hex


def sheet_of(scope: MutableMapping[str, Any]) -> Sheet:
    """Where it is noted what a request asks for and begins."""
    sheet: Sheet = scope.setdefault("state", {}).setdefault("sheet", Sheet())
    return sheet


def tenant_of(request: Request) -> str:
    """The name of the API key that came with the request; empty if no key is required."""
    tenant: str = request.scope.get("state", {}).get("tenant", "")
    return tenant


def session_of(request: Request, session_key: str | None = None) -> str:
    """The client's name for the session that a request belongs to: its header, otherwise the `prompt_cache_key` in its
    body; empty if it has neither.

    Raises:
        APIError: a 400; the header is too long.
    """
    session = request.headers.get(SESSION_HEADER, "").strip()
    if len(session) > MAX_SESSION_CHARS:
        raise invalid(f"{SESSION_HEADER}: at most {MAX_SESSION_CHARS} characters", SESSION_HEADER)
    return session or session_key or ""


def _priority(asked: int | None, account: Account | None) -> int:
    """The request's priority: the one it asks for, as far as its key allows."""
    if account is None:
        return asked or 0
    lowest, highest = account.key.limits.min_priority, account.key.limits.max_priority
    if asked is None:
        return min(max(0, lowest), highest)
    if asked < lowest:
        raise invalid(f"priority: must be at least {lowest} with this API key", "priority")
    if asked > highest:
        raise invalid(f"priority: must be at most {highest} with this API key", "priority")
    return asked


def timing_header(phases_ms: dict[str, float]) -> dict[str, str]:
    """How long each phase took, in milliseconds, in the syntax of `Server-Timing` (W3C): `route;dur=1.2,
    queue;dur=0.1`."""
    return {TIMING_HEADER: ", ".join(f"{name};dur={duration:.1f}" for name, duration in phases_ms.items())}


def _timeout_s(value: str | None) -> float | None:
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise invalid(f"{TIMEOUT_HEADER}: must be a positive number of seconds", TIMEOUT_HEADER)
    return seconds
