"""What is recorded of each request, and the summary of a run, by vLLM's definitions.

The definitions are those of `vllm bench serve` (`calculate_metrics` in vllm/benchmarks/serve.py and the functions in
vllm/benchmarks/lib/endpoint_request_func.py, https://github.com/vllm-project/vllm); docs/benchmarking.md lists them and
where this differs.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

PERCENTILES = (50, 90, 99)
GOODPUT_METRICS = ("ttft", "tpot", "e2el")


class RequestRecord(msgspec.Struct, gc=False):
    """One request as the client saw it, in seconds; points in time count from the run's start.

    Attributes:
        index: its place in the workload.
        sent_s: when the client began to connect and send.
        ended_s: when the last byte had come, or when it failed.
        scheduled_s: when it was due; None in a closed loop.
        ttft_s: time from sending to the first chunk; None if there was none.
        latency_s: time from sending to the last chunk (vLLM's E2EL).
        gaps_s: times between one chunk and the next (vLLM's ITL).
        num_input_tokens: as the server counts, else as planned.
        num_output_tokens: as the server counts (`usage`), else the number of chunks.
        is_counted_by_server: whether `num_output_tokens` is the server's.
        error_kind: None for an answer that came whole.
        error_example: what the server or the system said.
        retry_after_s: of an answer 429 with `Retry-After`.
    """

    index: int
    sent_s: float
    ended_s: float = 0.0
    scheduled_s: float | None = None
    ttft_s: float | None = None
    latency_s: float | None = None
    gaps_s: list[float] = []
    num_input_tokens: int = 0
    num_output_tokens: int = 0
    is_counted_by_server: bool = False
    error_kind: str | None = None
    error_example: str | None = None
    retry_after_s: float | None = None

    @property
    def is_completed(self) -> bool:
        """Whether the whole answer came."""
        return self.error_kind is None

    @property
    def is_refused(self) -> bool:
        """Whether the server said when to come back instead of failing."""
        return self.retry_after_s is not None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for a single token."""
        if self.latency_s is None or self.ttft_s is None or self.num_output_tokens <= 1:
            return None
        return (self.latency_s - self.ttft_s) / (self.num_output_tokens - 1)


def parse_goodput(text: str | None) -> dict[str, float]:
    """Limits in milliseconds from `ttft:500,tpot:25`; `e2el` (or `e2e`) limits the whole answer.

    Raises:
        ValueError: the text has another form.
    """
    limits: dict[str, float] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        name, _, value = part.strip().partition(":")
        name = "e2el" if name == "e2e" else name
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = -1.0
        if name not in GOODPUT_METRICS or not limits[name] > 0:
            raise ValueError(f"--goodput {part!r}: give milliseconds for {', '.join(GOODPUT_METRICS)}, as in ttft:500")
    return limits


def is_good(record: RequestRecord, limits_ms: Mapping[str, float]) -> bool:
    """Whether a request came whole and within every limit; of a single token TPOT is 0, as in vLLM."""
    if record.error_kind is not None:
        return False
    measured = {"ttft": record.ttft_s, "tpot": record.tpot_s, "e2el": record.latency_s}
    return all((measured[name] or 0.0) * 1e3 <= limit for name, limit in limits_ms.items())


def distribution(seconds: Iterable[float]) -> dict[str, float] | None:
    """Mean, standard deviation (of the population), percentiles (linear between samples) and maximum, in milliseconds.

    Returns:
        None where there is nothing.
    """
    values = np.fromiter(seconds, dtype=np.float64) * 1e3
    if not values.size:
        return None
    percentiles = np.percentile(values, PERCENTILES)
    named = {f"p{p}": float(value) for p, value in zip(PERCENTILES, percentiles, strict=True)}
    row = {"mean": float(values.mean()), "std": float(values.std()), **named, "max": float(values.max())}
    return {name: round(value, 3) for name, value in row.items()}


def summarize(records: Sequence[RequestRecord], duration_s: float, limits_ms: Mapping[str, float]) -> dict[str, Any]:
    """Summarize the requests of a run.

    Args:
        records: requests that ended, in whatever way.
        duration_s: from the start to the last end, the tail of an open loop included, as in vLLM.
        limits_ms: what `parse_goodput` returned; empty for no goodput.

    Returns:
        Numbers ready for JSON: latencies in milliseconds, rates a second. Latencies and tokens are those of completed
        requests.
    """
    completed = [record for record in records if record.is_completed]
    num_refused = sum(record.is_refused for record in records)
    num_input = sum(record.num_input_tokens for record in completed)
    num_output = sum(record.num_output_tokens for record in completed)
    span = max(duration_s, 1e-9)
    good = sum(is_good(record, limits_ms) for record in completed)
    return {
        "completed": len(completed),
        "refused": num_refused,
        "failed": len(records) - len(completed) - num_refused,
        "duration_s": round(duration_s, 3),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "output_tokens_counted_by": _counted_by(completed),
        "request_throughput": round(len(completed) / span, 4),
        "request_goodput": round(good / span, 4) if limits_ms else None,
        "goodput_limits_ms": dict(limits_ms),
        "output_tokens_per_s": round(num_output / span, 2),
        "total_tokens_per_s": round((num_input + num_output) / span, 2),
        "ttft_ms": distribution(r.ttft_s for r in completed if r.ttft_s is not None),
        "tpot_ms": distribution(t for r in completed if (t := r.tpot_s) is not None),
        "itl_ms": distribution(gap for r in completed for gap in r.gaps_s),
        "e2e_ms": distribution(r.latency_s for r in completed if r.latency_s is not None),
        "errors": _errors(records),
    }


def _counted_by(completed: Sequence[RequestRecord]) -> str | None:
    """Who counted output tokens: `usage`, `chunks` where the server sends no usage, or `both`."""
    if not completed:
        return None
    by_server = sum(record.is_counted_by_server for record in completed)
    return "usage" if by_server == len(completed) else "chunks" if not by_server else "both"


def _errors(records: Sequence[RequestRecord]) -> dict[str, dict[str, Any]]:
    """Number of each kind of error and what the first said, most frequent first."""
    errors: dict[str, dict[str, Any]] = {}
    for record in records:
        if record.error_kind is not None:
            entry = errors.setdefault(record.error_kind, {"count": 0, "example": record.error_example})
            entry["count"] += 1
    return dict(sorted(errors.items(), key=lambda item: -item[1]["count"]))
