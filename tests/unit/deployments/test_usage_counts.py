"""What keys use, as metrics: adapters with ever new names do not make ever more series."""

import pytest

from deployments.observe import usage_counts
from deployments.observe.usage_counts import OTHER, UsageCounts


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
