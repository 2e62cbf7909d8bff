"""`UsageCounts`: what each API key has used of each model since a router started, for Prometheus."""

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, Metric

PREFIX = "rayline:key_"
"""Metrics that name keys begin with this; they are for administrators."""
_LABELS = ("model_name", "router", "key")
_MAX_PLACES = 2_000
OTHER = "other"
"""The model's name in what is counted after so many pairs of key and model, and the key's after as many more: keys and
adapters come and go, series only come."""
UNKNOWN = "unknown"
"""The key under which requests without a known key count."""
_FAMILIES = (
    (f"{PREFIX}requests", "Requests of an API key that have ended, refused ones left out."),
    (f"{PREFIX}prompt_tokens", "Prompt tokens of an API key's requests."),
    (f"{PREFIX}cached_tokens", "Prompt tokens of an API key's requests that came from the prefix cache."),
    (f"{PREFIX}output_tokens", "Output tokens of an API key's requests."),
)


class UsageCounts:
    """The number of series is bounded: after `_MAX_PLACES` pairs of a key and a model or adapter, new ones count under
    the model `other`, and after twice as many under the key `other`, too."""

    def __init__(self) -> None:
        self._places: set[tuple[str, str]] = set()
        self._used: dict[tuple[str, str], list[int]] = {}
        self._refused: dict[tuple[str, str, str], int] = {}

    def count(
        self,
        key: str,
        model: str,
        refusal: str = "",
        *,
        num_requests: int,
        prompt_tokens: int = 0,
        cached_tokens: int = 0,
        output_tokens: int = 0,
    ) -> None:
        """Count requests that have ended, or, with a reason, refused ones."""
        key, model = self._place(key, model)
        if refusal:
            self._refused[key, model, refusal] = self._refused.get((key, model, refusal), 0) + num_requests
            return
        row = self._used.setdefault((key, model), [0, 0, 0, 0])
        for index, value in enumerate((num_requests, prompt_tokens, cached_tokens, output_tokens)):
            row[index] += value

    def _place(self, key: str, model: str) -> tuple[str, str]:
        """The key and the model under which something counts."""
        for place, most in (((key, model), _MAX_PLACES), ((key, OTHER), 2 * _MAX_PLACES)):
            if place in self._places or len(self._places) < most or place == (UNKNOWN, ""):
                self._places.add(place)
                return place
        return OTHER, OTHER

    def families(self, router_id: str) -> Iterator[Metric]:
        """All counts as metrics."""
        for index, (name, text) in enumerate(_FAMILIES):
            family = CounterMetricFamily(name, text, labels=_LABELS)
            for (key, model), row in self._used.items():
                family.add_metric((model, router_id, key), row[index])
            yield family
        family = CounterMetricFamily(
            f"{PREFIX}refusals",
            "Requests of an API key that were refused, by kind of error.",
            labels=(*_LABELS, "reason"),
        )
        for (key, model, reason), number in self._refused.items():
            family.add_metric((model, router_id, key, reason), number)
        yield family


def without_keys(families: Iterable[Metric]) -> tuple[Metric, ...]:
    """The metrics that name no key."""
    return tuple(family for family in families if not family.name.startswith(PREFIX))
