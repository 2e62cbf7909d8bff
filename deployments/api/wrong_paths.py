"""What a client is told that asks at a path where nothing is served."""

import re
from collections.abc import Sequence
from difflib import get_close_matches

from starlette._utils import get_route_path  # the path that Starlette matches routes against
from starlette.requests import Request
from starlette.routing import compile_path

from deployments.api.errors import unknown_route
from deployments.api.route_table import Route
from deployments.chat.errors import APIError

_MAX_PARTS = 12
"""Most parts of a path that is taken apart."""
_MAX_CHARS = 100
_LIKE = 0.9


class WrongPaths:
    """Finds the path that a client probably meant. Clients join a base address and a path, and most mistakes are made
    in the base address: without `/v1`, or with a `/v1` or a whole path too many.

    Args:
        table: every route there is.
    """

    def __init__(self, table: Sequence[Route]) -> None:
        self._paths: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
        for route in table:
            self._paths.setdefault(route.method, []).append((route.path, compile_path(route.path)[0]))

    def not_found(self, request: Request) -> APIError:
        """The error for a path at which nothing is served."""
        path = get_route_path(request.scope)
        return unknown_route(
            path[:_MAX_CHARS], self._meant(path, "GET" if request.method == "HEAD" else request.method)
        )

    def _meant(self, path: str, method: str) -> str | None:
        known = self._paths.get(method, [])
        parts = path.split("/")[1:]
        if len(parts) > _MAX_PARTS or len(path) > _MAX_CHARS:
            return None
        for i in range(len(parts)):
            rest = "/" + "/".join(parts[i:])
            for meant in (rest, f"/v1{rest}"):
                if meant != "/" and any(pattern.fullmatch(meant) for _, pattern in known):
                    return meant
        return next(iter(get_close_matches(path, [name for name, _ in known], n=1, cutoff=_LIKE)), None)
