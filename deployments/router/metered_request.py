"""`MeteredRequest`: what one HTTP request uses, from its beginning to its end."""

import time
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from deployments.usage.entries import Entry


class RequestMeter(Protocol):
    """Adds up what metered requests tell it."""

    def note_output(self, request: "MeteredRequest", num_tokens: int) -> None:
        """A request has generated tokens."""
        ...

    def note_end(self, request: "MeteredRequest") -> None:
        """A request has ended; its entry is final."""
        ...


class MeteredRequest:
    """What one HTTP request uses. Its router's event loop writes it.

    Args:
        meter: adds it up.
        entry: what is recorded if the router is killed before the request ends.
        number: what the spool calls it while it is open; None if the spool does not know it.

    Attributes:
        entry: what is recorded, final once `is_closed`.
        num_output_tokens: tokens generated so far.
        num_counted: tokens that its meter has counted for it so far, the prompt's included.
    """

    def __init__(self, meter: RequestMeter, entry: Entry, number: int | None) -> None:
        self.entry = entry
        self.number = number
        self.num_output_tokens = 0
        self.num_counted = entry.prompt_tokens
        self.is_closed = False
        self._meter = meter
        self._began_at = time.monotonic()

    @property
    def outcome(self) -> str:
        """How it ended, as in `Entry`; `abort` while it is being given up."""
        return self.entry.outcome if self.is_closed else "abort"

    @property
    def num_answer_tokens(self) -> int:
        """Output tokens as they are recorded, or generated so far."""
        return self.entry.output_tokens if self.is_closed else self.num_output_tokens

    def add_output(self, num_tokens: int) -> None:
        """Count tokens that were generated."""
        if num_tokens and not self.is_closed:
            self.num_output_tokens += num_tokens
            self.num_counted += num_tokens
            self._meter.note_output(self, num_tokens)

    def close(self, outcome: str, reason: str, prompt_tokens: int, cached_tokens: int, output_tokens: int) -> None:
        """Record what it has used, all as in `Entry`. No effect a second time."""
        if self.is_closed:
            return
        self.is_closed = True
        self.entry = msgspec.structs.replace(
            self.entry,
            outcome=outcome,
            reason=reason,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            output_tokens=output_tokens,
            duration_s=round(time.monotonic() - self._began_at, 6),
        )
        self._meter.note_end(self)


@dataclass(slots=True)
class Sheet:
    """What is noted about an HTTP request on its way in, for the record and for the audit.

    Attributes:
        model: name of the model or adapter that answers; "" until that is known.
        metered: the work that the request has begun.
        request_id: its `X-Request-ID`.
    """

    model: str = ""
    request_id: str = ""
    metered: list[MeteredRequest] = field(default_factory=list)
