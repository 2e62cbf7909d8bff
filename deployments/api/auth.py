"""API keys: if any are configured, every route needs one except those listed as open, and each key has its limits."""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime

from starlette._utils import get_route_path  # the path that Starlette matches routes against
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api.errors import answer_to
from deployments.api.on_behalf import behalf_of
from deployments.chat.errors import APIError, of_engine
from deployments.errors import AccountantAwayError
from deployments.router.access import Access
from deployments.router.accounts import Account, Refusal
from deployments.router.budgets import QUOTA
from deployments.router.keys import ApiKey

_KEPT_FREE = Refusal("requests", "Half of this API key's limits is kept for requests that are not of batches", 1.0)


class KeyGuard:
    """ASGI middleware that lets requests with a known key through, as often as the key's limits allow.

    The key comes as `Authorization: Bearer <key>`, or as `x-api-key: <key>`, which Anthropic's clients send, or as both
    if they agree. The guard checks the same path as the routes, so no header can change which route is guarded.

    Args:
        app: the application to guard.
        access: the keys, and what each may still do.
        open_paths: paths that need no key.
        metered_paths: paths whose POST requests count toward the key's limits.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        open_paths: Collection[str],
        metered_paths: Collection[str] = (),
    ) -> None:
        self._app = app
        self._access = access
        self._open_paths = frozenset(open_paths)
        self._metered_paths = frozenset(metered_paths)
        self._num_entering: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 or 429, or pass the request on."""
        if scope["type"] == "lifespan" or not self._access.needs_key or get_route_path(scope) in self._open_paths:
            await self._app(scope, receive, send)
            return
        given = _keys_given(scope)
        behalf = behalf_of(scope)
        key = self._find(given) if behalf is None else self._access.named(behalf.owner)
        if scope["type"] == "websocket" and (key is None or key.is_expired(self._access.clock())):
            await send({"type": "websocket.close", "code": 1008})
        elif key is None:
            await answer_to(scope, _unauthorized(bool(given)))(scope, receive, send)
        elif key.is_expired(self._access.clock()):
            scope.setdefault("state", {})["tenant"] = key.name
            await answer_to(scope, _expired(key))(scope, receive, send)
        else:
            account = self._access.account(key)
            scope.setdefault("state", {}).update(tenant=key.name, account=account, key_digest=key.digest)
            if scope.get("method") == "POST" and get_route_path(scope) in self._metered_paths:
                await self._metered(account, scope, receive, send)
            else:
                await self._app(scope, receive, send)

    async def _metered(self, account: Account, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on if the account allows it, and report in the answer's headers what is left."""

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), *_encoded(account.headers())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            refusal = await self._enter(account, is_of_batch=behalf_of(scope) is not None)
        except AccountantAwayError as error:
            await answer_to(scope, of_engine(error))(scope, receive, send)
            return
        if refusal is not None:
            await answer_to(scope, _too_many(refusal))(scope, receive, send_with_limits)
            return
        try:
            await self._app(scope, receive, send_with_limits)
        finally:
            account.leave()

    async def _enter(self, account: Account, *, is_of_batch: bool) -> Refusal | None:
        """Open a request, or say why it cannot be opened; see `Access.enter`. Batches leave half of each limit."""
        if not is_of_batch:
            return await self._access.enter(account)
        name = account.key.name
        if account.is_half_used(self._num_entering[name]):
            return _KEPT_FREE
        self._num_entering[name] += 1
        try:
            return await self._access.enter(account)
        finally:
            self._num_entering[name] -= 1

    def _find(self, given: Sequence[bytes]) -> ApiKey | None:
        """The known key that was given, once or in several headers."""
        return self._access.with_secret(given[0]) if len(set(given)) == 1 else None


def _keys_given(scope: Scope) -> list[bytes]:
    """Every key in the headers; for anything that is not a bearer token, an empty key, which belongs to nobody.

    A header that holds no key at all is as good as none: some clients send `Authorization: Bearer`, or an empty
    `x-api-key`, along with the header that holds the key.
    """
    given = []
    for name, value in scope["headers"]:
        value = value.strip()
        if name == b"authorization" and value:
            scheme, _, token = value.partition(b" ")
            is_bearer = scheme.lower() == b"bearer"
            if not is_bearer or token:
                given.append(token.strip() if is_bearer else b"")
        elif name == b"x-api-key" and value:
            given.append(value)
    return given


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def _too_many(refusal: Refusal) -> APIError:
    headers = {"Retry-After": str(math.ceil(refusal.retry_after_s))}
    if refusal.code == QUOTA:
        headers["x-should-retry"] = "false"  # OpenAI's and Anthropic's clients would try again within seconds
    return APIError(429, refusal.message, type=refusal.limit, code=refusal.code, headers=headers)


def _expired(key: ApiKey) -> APIError:
    at = datetime.fromtimestamp(key.expires_at or 0, UTC).isoformat()
    message = f"This API key expired at {at}; ask for a new one, or for a later expires_at"
    return APIError(401, message, code="expired_api_key", headers={"WWW-Authenticate": "Bearer"})


def _unauthorized(is_wrong: bool) -> APIError:
    message = (
        "Incorrect API key provided" if is_wrong
        else "You didn't provide an API key; send it as `Authorization: Bearer <key>`"
    )  # fmt: skip
    return APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
