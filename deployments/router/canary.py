"""Splits the requests for one name among the entries that share it, by their weights."""

import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol, TypeVar


class Entry(Protocol):
    """An entry of `models`."""

    @property
    def key(self) -> str:
        """A name that only this entry has."""
        ...

    @property
    def weight(self) -> float:
        """Its share of the requests, relative to the others."""
        ...

    @property
    def can_answer(self) -> bool:
        """Whether a request that arrives now is answered."""
        ...


EntryT = TypeVar("EntryT", bound=Entry)


def mark_of(key: str) -> str:
    """A short mark of an entry, by which a later request can refer to it."""
    return f"_{blake2b(key.encode(), digest_size=4).hexdigest()}"


def share_out(entries: Sequence[EntryT], session: str) -> EntryT | None:
    """The entry that a session's requests go to; None if there are no entries.

    It depends only on the session, the weights, and which entries can answer: entries that cannot are passed over
    while another can. Where a weight changes or an entry joins or leaves, only those sessions move that have to
    (rendezvous hashing with weights: https://en.wikipedia.org/wiki/Rendezvous_hashing).
    """
    if len(entries) < 2:
        return entries[0] if entries else None
    weighted = [entry for entry in entries if entry.weight > 0] or list(entries)
    able = [entry for entry in weighted if entry.can_answer] or weighted
    return max(able, key=lambda entry: _score(entry, session))


def _score(entry: Entry, session: str) -> float:
    digest = blake2b(f"{entry.key}\0{session}".encode(), digest_size=8).digest()
    uniform = (int.from_bytes(digest) + 1) / (2**64 + 2)
    return -entry.weight / math.log(uniform)
