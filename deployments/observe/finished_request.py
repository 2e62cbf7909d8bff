"""What metrics, traces and the log are told about a finished request."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.trace import Span


@dataclass(slots=True)
class Timeline:
    """When things happened to a request, by the monotonic clock, and how long the engine took; None for not yet."""

    received_at: float
    started_at: float
    """Parsed, tokenised and admitted."""
    placed_at: float | None = None
    """Sent to a replica, the first time."""
    first_token_at: float | None = None
    ended_at: float | None = None
    engine_queue_s: float | None = None
    """Seconds the request waited in the engine; None where the engine did not say."""
    engine_prefill_s: float | None = None
    """Seconds from there to its first token."""

    def phases_ms(self) -> dict[str, float]:
        """Milliseconds of each phase that has ended: route, queue, prefill, relay, decode."""
        phases = {"route": self.started_at - self.received_at}
        if self.placed_at is not None and self.first_token_at is not None:
            engine_s = self.first_token_at - self.placed_at
            queue_s = self.engine_queue_s or 0.0
            prefill_s = engine_s if self.engine_prefill_s is None else self.engine_prefill_s
            phases["queue"] = self.placed_at - self.started_at + queue_s
            phases["prefill"] = prefill_s
            phases["relay"] = max(0.0, engine_s - queue_s - prefill_s)
            if self.ended_at is not None:
                phases["decode"] = self.ended_at - self.first_token_at
        return {name: round(1000 * seconds, 3) for name, seconds in phases.items()}


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """One request that has ended, in whatever way.

    Attributes:
        http_request_id: the HTTP request's `X-Request-ID`.
        generation_id: the request's own id.
        tenant: name of the key that asked; "" if there are no keys.
        finish_reason: how it ended; None if it was given up or failed.
        error_type: the name of the error that ended it, if one did.
        num_moves: how often it continued on another replica.
        span: the HTTP request's span in its trace; None if there are no traces.
        adapter: name of the adapter that it chose; "" for none.
    """

    http_request_id: str
    generation_id: str
    tenant: str
    finish_reason: str | None
    error_type: str | None
    num_prompt_tokens: int
    num_output_tokens: int
    num_moves: int
    timeline: Timeline
    span: "Span | None"
    adapter: str = ""
