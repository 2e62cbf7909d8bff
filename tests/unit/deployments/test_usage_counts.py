"""What keys use, as metrics: adapters with ever new names do not make ever more series."""

import pytest

from deployments.observe import usage_counts
from deployments.observe.usage_counts import OTHER, UNKNOWN, UsageCounts


def test_new_names_are_counted_together_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(usage_counts, "_MAX_PLACES", 3)
    counts = UsageCounts()
    for name in ("a", "b", "c", "d", "e", "a"):
        counts.count("team", name, num_requests=1, output_tokens=5)
    counts.count("guest", "f", "rate_limit", num_requests=1)
    samples = {
        (sample.name, sample.labels["key"], sample.labels["model_name"]): sample.value
        for family in counts.families("router")
        for sample in family.samples
    }
    requests = {model: n for (name, _, model), n in samples.items() if name == "rayline:key_requests_total"}
    assert requests == {"a": 2, "b": 1, "c": 1, OTHER: 2}
    assert samples["rayline:key_output_tokens_total", "team", OTHER] == 10
    assert samples["rayline:key_refusals_total", "guest", OTHER] == 1


def test_keys_are_counted_together_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch):
    """Keys come and go with their file; those without a known key stay apart."""
    monkeypatch.setattr(usage_counts, "_MAX_PLACES", 3)
    counts = UsageCounts()
    for number in range(100):
        counts.count(f"key-{number}", "chat", num_requests=1)
    counts.count("key-0", "chat", num_requests=1)
    counts.count(UNKNOWN, "", "invalid_api_key", num_requests=1)
    requests, *_, refusals = counts.families("router")
    assert {(s.labels["key"], s.labels["model_name"]): s.value for s in requests.samples} == {
        ("key-0", "chat"): 2, ("key-1", "chat"): 1, ("key-2", "chat"): 1,
        ("key-3", OTHER): 1, ("key-4", OTHER): 1, ("key-5", OTHER): 1, (OTHER, OTHER): 94,
    }  # fmt: skip
    assert [s.labels["key"] for s in refusals.samples] == [UNKNOWN]
