"""A replica's state in Ray's own export, which has every replica whatever router is asked."""

from dataclasses import asdict

from llm.serving.schemas import EngineStats


class EngineMetrics:
    """Gauges and counters of one engine, by vLLM's names without the colon. Made in a process of Ray's.

    Args:
        model: value of the label `model_name`.
        replica_id: value of the label `engine`.
    """

    def __init__(self, model: str, replica_id: str) -> None:
        from ray.util.metrics import Counter, Gauge

        names = ("model_name", "engine")
        self._tags = {"model_name": model, "engine": replica_id}
        self._gauges = {
            "num_running": Gauge("vllm_num_requests_running", "Requests in the batch.", names),
            "num_waiting": Gauge("vllm_num_requests_waiting", "Requests that wait in the engine.", names),
            "num_waiting_tokens": Gauge("rayline_waiting_prefill_tokens", "Tokens still to prefill.", names),
        }
        self._usage = Gauge("vllm_kv_cache_usage_perc", "Share of the slot pool in use, 0 to 1.", names)
        self._counters = {
            "num_preemptions": Counter("vllm_num_preemptions", "Requests preempted.", names),
            "num_prompt_tokens": Counter("vllm_prompt_tokens", "Prompt tokens.", names),
            "num_generated_tokens": Counter("vllm_generation_tokens", "Tokens generated.", names),
            "num_cached_prompt_tokens": Counter("vllm_prefix_cache_hits", "Prompt tokens found.", names),
        }
        self._last = dict.fromkeys(self._counters, 0)

    def update(self, stats: EngineStats) -> None:
        """Take over the engine's latest state."""
        values = asdict(stats)
        for name, gauge in self._gauges.items():
            gauge.set(values[name], self._tags)
        self._usage.set(stats.num_used_pages / max(stats.num_pages, 1), self._tags)
        for name, counter in self._counters.items():
            if values[name] > self._last[name]:
                counter.inc(values[name] - self._last[name], self._tags)
                self._last[name] = values[name]
