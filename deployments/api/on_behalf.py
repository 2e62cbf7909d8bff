"""Marks requests that the server makes itself, on behalf of an API key whose secret it does not know.

The mark is an object in the request's scope. Nothing that a client sends ends up there as such an object.
"""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

_KEY = "rayline_on_behalf"


@dataclass(frozen=True, slots=True)
class OnBehalf:
    """Whom a request is made for.

    Attributes:
        owner: the name of the API key; "" if there were no keys.
    """

    owner: str


def mark(scope: MutableMapping[str, Any], behalf: OnBehalf) -> None:
    """Mark a request."""
    scope.setdefault("state", {})[_KEY] = behalf


def behalf_of(scope: Mapping[str, Any]) -> OnBehalf | None:
    """Whom a request is made for; None for a client's own request."""
    found = scope.get("state", {}).get(_KEY)
    return found if isinstance(found, OnBehalf) else None
