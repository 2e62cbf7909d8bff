"""Settings of the adapters that requests for a model may choose; a part of `ServedModelConfig`."""

import re
from collections import Counter

from pydantic import Field, field_validator

from llm.config import StrictModel

MAX_NAME_CHARS = 256


def check_client_name(name: str) -> str:
    """The name of a model or an adapter, if clients can use it as a request's `model`.

    Raises:
        ValueError: they cannot.
    """
    if not name or len(name) > MAX_NAME_CHARS or name != name.strip() or not name.isprintable():
        raise ValueError(
            f"a name has 1 to {MAX_NAME_CHARS} printable characters and no space at either end, unlike {name[:80]!r}"
        )
    return name


class AdapterEntry(StrictModel):
    """An adapter that is served from the start."""

    name: str
    """The name that requests give as their `model`."""
    path: str = Field(min_length=1, max_length=4096)
    """Directory of a PEFT adapter, or a Hub id such as `org/name`, which each node downloads that needs it."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return check_client_name(name)


def check_roots(roots: tuple[str, ...]) -> tuple[str, ...]:
    """The value of `adapter_roots`, if it can be used.

    Raises:
        ValueError: it cannot.
    """
    if any(not re.match(r"[/~]", root) for root in roots):
        raise ValueError("adapter_roots holds a relative path; give absolute ones")
    return roots


def check_entries(entries: tuple[AdapterEntry, ...], max_known: int) -> None:
    """Check that entries have different names, and are not too many.

    Raises:
        ValueError: they have not, or are.
    """
    names = [entry.name for entry in entries]
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise ValueError(f"adapters: two entries have the name {twice[0]!r}; give one of them another name")
    if len(names) > max_known:
        raise ValueError(f"adapters: there are {len(names)} entries; raise max_known_adapters to at least that")
