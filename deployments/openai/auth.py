"""Keys: with any configured, every route is closed but the ones listed as open."""

import hashlib
import hmac
from collections.abc import Collection

from starlette._utils import get_route_path  # the path that Starlette's routes look at
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.openai.errors import APIError


class KeyGuard:
    """ASGI middleware that lets requests through that carry `Authorization: Bearer <key>`.

    It looks at the path that the routes look at, so no header changes which route is guarded.

    Args:
        app: what is guarded.
        digests: SHA-256 of each key; none to let everything through.
        open_paths: paths that need no key.
    """

    def __init__(self, app: ASGIApp, digests: Collection[bytes], open_paths: Collection[str]) -> None:
        self._app = app
        self._digests = tuple(digests)
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, or pass the request on."""
        if scope["type"] == "lifespan" or not self._digests or self._is_open(scope) or self._find_key(scope):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        await _unauthorized(self._has_header(scope)).response()(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        return get_route_path(scope) in self._open_paths

    def _has_header(self, scope: Scope) -> bool:
        return any(name == b"authorization" for name, _ in scope["headers"])

    def _find_key(self, scope: Scope) -> bool:
        """Whether the request carries a known key; notes whose it is."""
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(values) != 1 or values[0][:7].lower() != b"bearer ":
            return False
        digest = hashlib.sha256(values[0][7:].strip()).digest()
        # Every key is compared, so that the time tells nothing about which one came near.
        if not sum(hmac.compare_digest(digest, known) for known in self._digests):
            return False
        scope.setdefault("state", {})["tenant"] = digest.hex()[:16]
        return True


def _unauthorized(is_wrong: bool) -> APIError:
    message = (
        "Incorrect API key provided" if is_wrong
        else "You didn't provide an API key; send it as `Authorization: Bearer <key>`"
    )  # fmt: skip
    return APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
