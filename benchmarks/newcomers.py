"""How new sequences should be let in beside running ones: the scheduler alone, against a model of a step's time.

    python -m benchmarks.newcomers [--most 512 1024 2048] [--beside 192]

256 requests of 100 to 1,024 tokens in and out that arrive within a time of each other. Steps take about what they took
on one H100 (benchmarks.engine): so much, so much a token, so much a token of context. One JSON line a row.
"""

import argparse
import json
import random
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import llm.scheduling.scheduler as scheduling
from benchmarks.engine_rows import percentile
from llm.scheduling.sequence import Sequence, StepPlan
from llm.scheduling.slot_pool import SlotPool
from llm.serving.schemas import GenerationRequest

_NUM_REQUESTS = 256


class StepTime(NamedTuple):
    """Milliseconds of a step."""

    least: float
    each_token: float
    """Of prefilling steps, past the first 64."""
    each_decode: float
    """Of steps that only decode, past the first 64."""
    each_context_token: float
    """Of decodes."""

    def of(self, plan: StepPlan) -> float:
        """What this step takes."""
        decodes = [part for part in plan.parts if part.num_tokens == 1]
        is_prefilling = len(decodes) < len(plan.parts)
        each_token = self.each_token if is_prefilling else self.each_decode
        tokens = max(plan.num_tokens - 64, 0)
        return self.least + each_token * tokens + self.each_context_token * sum(part.start for part in decodes)


MODELS = {
    "llama-3.1-8b": StepTime(5.9, 0.0232, 0.0117, 4.8e-5),
    "qwen3-0.6b": StepTime(1.1, 0.00262, 0.0031, 4.1e-5),
}


def run_to_end(
    scheduler: scheduling.Scheduler, step_time: StepTime, arrivals: deque[tuple[float, int, int]]
) -> Iterator[tuple[float, float, Sequence]]:
    """Run requests, (arrival in seconds, tokens in, tokens out) in order, to their end.

    The next step is always planned before the last one's tokens are known.

    Yields:
        For each token the second in which it is known, its request's arrival, and its sequence.
    """
    now, in_flight = 0.0, deque[StepPlan]()
    arrived: dict[Sequence, float] = {}
    while arrivals or scheduler.has_pending_work:
        while arrivals and (arrivals[0][0] <= now or not scheduler.has_pending_work):
            at, num_prompt, max_new_tokens = arrivals.popleft()
            now = max(now, at)
            prompt = (1,) * num_prompt
            request = GenerationRequest(prompt_token_ids=prompt, max_new_tokens=max_new_tokens, ignore_eos=True)
            sequence = Sequence(request, prompt, frozenset(), 16)
            arrived[sequence] = at
            scheduler.add(sequence)
        plan = scheduler.schedule()
        if plan.parts:
            now += step_time.of(plan) / 1e3
            in_flight.append(plan)
            if len(in_flight) < 2:
                continue
        oldest = in_flight.popleft()
        for event in scheduler.apply(oldest, [0] * sum(part.num_draws for part in oldest.parts)):
            yield now, arrived[event.sequence], event.sequence


def simulate(step_time: StepTime, arrive_within_s: float, beside: int) -> dict[str, Any]:
    """Run all requests to their end."""
    rng = random.Random(0)
    lens = [(rng.randint(100, 1024), rng.randint(100, 1024)) for _ in range(_NUM_REQUESTS)]
    times = sorted((rng.random() * arrive_within_s, i) for i in range(_NUM_REQUESTS))
    scheduler = scheduling.Scheduler(
        SlotPool(28_000, 16), max_batch_size=256, max_tokens_per_step=8192, max_prefill_beside_decodes=beside,
        max_seq_len=4096, enable_prefix_caching=False,
    )  # fmt: skip
    now = 0.0
    last: dict[Sequence, float] = {}
    first_tokens: list[float] = []
    gaps: list[float] = []
    for now, arrived, sequence in run_to_end(scheduler, step_time, deque((at, *lens[i]) for at, i in times)):
        (gaps if sequence in last else first_tokens).append(now - last.get(sequence, arrived))
        last[sequence] = now
    return {
        "output_tok_s": round(sum(num_out for _, num_out in lens) / now),
        "ttft_p50_ms": round(percentile(first_tokens, 0.5) * 1e3),
        "ttft_p99_ms": round(percentile(first_tokens, 0.99) * 1e3),
        "gap_p50_ms": round(percentile(gaps, 0.5) * 1e3, 1),
        "gap_p99_ms": round(percentile(gaps, 0.99) * 1e3, 1),
    }


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], help="tokens of a step")
    parser.add_argument("--beside", type=int, default=192, help="tokens of a share")
    parser.add_argument("--arrive-within-s", type=float, default=0.4, help="time in which all requests come")
    options = parser.parse_args()
    for model, step_time in MODELS.items():
        for most in options.most:
            scheduling._MOST_TOKENS_BESIDE_DECODES = most
            result = simulate(step_time, options.arrive_within_s, options.beside)
            print(json.dumps({"model": model, "most_tokens": most, **result}), flush=True)


if __name__ == "__main__":
    main()
