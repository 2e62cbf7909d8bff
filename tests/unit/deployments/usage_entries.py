"""Entries of the record of usage, for tests."""

from datetime import UTC, datetime

from deployments.usage.entries import Entry

MORNING = datetime(2030, 1, 31, 9, 30, tzinfo=UTC)


def entry(seq: int, **changes: object) -> Entry:
    fields = {
        "writer": "w1", "seq": seq, "opened": seq, "at": MORNING, "key": "team", "model": "demo", "outcome": "stop",
        "prompt_tokens": 10, "cached_tokens": 4, "output_tokens": 5, "request_id": f"r-{seq}", "duration_s": 0.5,
    }  # fmt: skip
    return Entry(**{**fields, **changes})
