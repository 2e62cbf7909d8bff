"""The outermost layer: it logs each request, and counts those that are refused."""

import time
from collections.abc import Collection, Sequence

from starlette._utils import get_route_path  # the path that Starlette matches routes against
from starlette.datastructures import Headers
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api.callers import REQUEST_ID_HEADER, sheet_of
from deployments.api.edge import plain_path
from deployments.api.route_table import Route
from deployments.observe.audit_log import AuditLine, log_audit
from deployments.observe.usage_counts import UNKNOWN
from deployments.router.access import Access
from deployments.router.metered_request import Sheet

_CLIENT_LEFT = 499
"""As in nginx's logs."""


class Audit:
    """ASGI middleware: one line in the log for each request, whatever becomes of it. Requests that succeed on open
    paths, such as probes, are left out.

    Args:
        app: everything inside.
        access: knows the keys; its meter counts refusals.
        table: the routes.
        open_paths: paths that need no key.
        metered_paths: paths whose POST requests ask for work.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        table: Sequence[Route],
        open_paths: Collection[str],
        metered_paths: Collection[str],
    ) -> None:
        self._app = app
        self._access = access
        self._paths = {route.path for route in table if "{" not in route.path}
        self._patterns = [(compile_path(route.path)[0], route.path) for route in table if "{" in route.path]
        self._open_paths = frozenset(open_paths)
        self._metered_paths = frozenset(metered_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and note how it ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["state"] = dict(scope.get("state", {}))
        began_at = time.monotonic()
        status = 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            self._note(scope, status or _CLIENT_LEFT, time.monotonic() - began_at)

    def _note(self, scope: Scope, status: int, duration_s: float) -> None:
        state, sheet = scope["state"], sheet_of(scope)
        route = self._route(scope)
        if route in self._open_paths and status < 400:
            return
        key: str | None = state.get("tenant")
        if key is None and not self._access.needs_key:
            key = ""
        reason = state.get("reason", "")
        if status == _CLIENT_LEFT and not reason:
            reason = "client_left"
        is_work = scope["method"] == "POST" and route in self._metered_paths
        if is_work and status >= 400 and not sheet.metered:
            self._access.meter.refuse(key, sheet.model, reason or f"status_{status}")
        entries = [metered.entry for metered in sheet.metered]
        account = state.get("account")
        log_audit(
            AuditLine(
                request_id=Headers(scope=scope).get(REQUEST_ID_HEADER, "")[:128],
                key=UNKNOWN if key is None else key,
                role=str(account.key.role) if account is not None else "",
                method=scope["method"],
                route=route,
                model=sheet.model,
                status=status,
                reason=reason,
                outcome=_outcome(sheet, is_error=bool(reason) and status != _CLIENT_LEFT),
                prompt_tokens=sum(entry.prompt_tokens for entry in entries),
                cached_tokens=sum(entry.cached_tokens for entry in entries),
                output_tokens=sum(metered.num_answer_tokens for metered in sheet.metered),
                duration_ms=round(1000 * duration_s, 3),
                client=str(scope["client"][0]) if scope.get("client") else "",
            )
        )

    def _route(self, scope: Scope) -> str:
        """The path of the table that answers; "" for none."""
        path = get_route_path({**scope, "path": plain_path(scope)})
        if path in self._paths or path in self._open_paths:
            return path
        return next((template for pattern, template in self._patterns if pattern.match(path)), "")


def _outcome(sheet: Sheet, *, is_error: bool) -> str:
    """How the first work of a request ended, as its entry in the record will say; "" for none.

    Args:
        sheet: of the request.
        is_error: whether the client was told of an error; the work may not have ended yet.
    """
    if not sheet.metered:
        return ""
    metered = sheet.metered[0]
    return "error" if is_error and not metered.is_closed else metered.outcome
