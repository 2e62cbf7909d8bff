"""What scheduling costs the host: admission, steps of many rows, long prompts beside rows that decode. No model runs.

    python -m benchmarks.host_step [--rows 512 1024] [--long 131072]

The next step is always planned before the last one's tokens are known, as on a GPU. One JSON line a measurement; times
are milliseconds of the processor in the fastest of three runs, so that what else the machine does hardly shows.
"""

import argparse
import gc
import json
import random
import time
from collections import deque
from collections.abc import Callable
from statistics import fmean
from typing import Any

from llm.scheduling.scheduler import Scheduler
from llm.scheduling.sequence import Sequence, StepPlan
from llm.scheduling.slot_pool import SlotPool
from llm.serving.schemas import GenerationRequest

_PAGE_SIZE = 16
_NUM_RUNS = 3
_NUM_STEPS = 256
_NUM_BESIDE = 64


class Host:
    """A scheduler one step ahead of a device that says token 1 at once, and the time that each of its calls took."""

    def __init__(self, num_rows: int, **options: Any) -> None:
        self.scheduler = Scheduler(
            SlotPool(100_000, _PAGE_SIZE), max_batch_size=num_rows, max_seq_len=200_000,
            **{"max_tokens_per_step": 8192, "max_prefill_beside_decodes": 192, **options},
        )  # fmt: skip
        self.times_ms: dict[str, list[float]] = {"add": [], "schedule": [], "apply": []}
        self._rng = random.Random(0)
        self._in_flight: deque[StepPlan] = deque()

    def add(self, tokens: tuple[int, ...], max_new_tokens: int = 100_000) -> None:
        """Queue a prompt as `add_request` does, once the request has been checked."""
        request = GenerationRequest(prompt_token_ids=tokens, max_new_tokens=max_new_tokens, ignore_eos=True)
        self._timed("add", lambda: self.scheduler.add(Sequence(request, tokens, frozenset({0}), _PAGE_SIZE)))

    def prompt(self, num_tokens: int) -> tuple[int, ...]:
        """A prompt like no other."""
        return tuple(self._rng.randrange(1, 100_000) for _ in range(num_tokens))

    def step(self) -> None:
        """Plan a step, and take in the one before it."""
        plan = self._timed("schedule", self.scheduler.schedule)
        if plan.parts:
            self._in_flight.append(plan)
        if self._in_flight and (len(self._in_flight) > 1 or not plan.parts):
            oldest = self._in_flight.popleft()
            token_ids = [self._rng.randrange(1, 100_000)] * sum(part.num_draws for part in oldest.parts)
            self._timed("apply", lambda: self.scheduler.apply(oldest, token_ids))

    def begin(self, num_rows: int) -> None:
        """Let so many sequences decode."""
        for _ in range(num_rows):
            self.add(self.prompt(self._rng.randrange(20, 200)))
        while self.scheduler.num_waiting_tokens > self.scheduler.num_running or self.scheduler.num_waiting:
            self.step()
        for times in self.times_ms.values():
            times.clear()

    def _timed(self, name: str, call):  # type: ignore[no-untyped-def]
        start = time.thread_time()
        result = call()
        self.times_ms[name].append((time.thread_time() - start) * 1e3)
        return result


def time_admission(num_rows: int) -> dict[str, float]:
    """One `schedule` that admits short prompts to every row of an idle scheduler."""
    host = Host(num_rows, max_tokens_per_step=8 * num_rows)
    for _ in range(num_rows):
        host.add(host.prompt(8))
    host.step()
    return {"schedule": host.times_ms["schedule"][0], "add_mean": fmean(host.times_ms["add"])}


def time_decoding(num_rows: int, **options: Any) -> dict[str, float]:
    """The mean step in which every row decodes."""
    host = Host(num_rows, **options)
    host.begin(num_rows)
    for _ in range(_NUM_STEPS):
        host.step()
    means = {name: fmean(times) for name, times in host.times_ms.items() if times}
    return {**means, "step": sum(means.values())}


def time_blocked_queue(num_rows: int) -> dict[str, float]:
    """The mean step in which every row but one decodes, while 200 prompts wait that find no pages."""
    host = Host(num_rows)
    host.begin(num_rows - 1)
    pool = host.scheduler.pool
    prompt = host.prompt(3 * num_rows * _PAGE_SIZE)
    pool.allocate(pool.num_available - 3 * num_rows)
    for _ in range(200):
        host.add(prompt)
    for _ in range(_PAGE_SIZE):
        host.step()
    return {"schedule": fmean(host.times_ms["schedule"])}


def time_long_prompts(num_tokens: int, *, is_cached: bool, **options: Any) -> dict[str, float]:
    """The longest single calls while three long prompts arrive beside 64 rows that decode."""
    host = Host(_NUM_BESIDE + 4, **options)
    prompts = [host.prompt(num_tokens) for _ in range(3)]
    for prompt in prompts if is_cached else ():
        host.add(prompt, 1)
        while host.scheduler.has_pending_work:
            host.step()
    host.begin(_NUM_BESIDE)
    gc.collect()
    gc.freeze()
    for prompt in prompts:
        host.add(prompt, 40)
        for _ in range(20):
            host.step()
    while host.scheduler.num_running + host.scheduler.num_waiting > _NUM_BESIDE:
        host.step()
    gc.unfreeze()
    return {f"longest_{name}": max(times) for name, times in host.times_ms.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 1024], help="rows of the scheduler")
    parser.add_argument("--long", type=int, default=131_072, help="tokens of the long prompts")
    options = parser.parse_args()
    guessing = {"num_speculative_tokens": 4}
    measurements: dict[str, Callable[[], dict[str, float]]] = {}
    for num_rows in options.rows:
        measurements[f"{num_rows} short prompts admitted at once"] = lambda n=num_rows: time_admission(n)
        measurements[f"{num_rows} rows decode"] = lambda n=num_rows: time_decoding(n)
        measurements[f"{num_rows} rows decode, 200 wait for pages"] = lambda n=num_rows: time_blocked_queue(n)
    for speculation, name in (({}, ""), (guessing, ", with speculation")):
        for is_cached in (False, True):
            title = f"prompts of {options.long:,} tokens{', cached' if is_cached else ''}{name}"
            measurements[title] = lambda c=is_cached, s=speculation: time_long_prompts(options.long, is_cached=c, **s)
    for name, measure in measurements.items():
        runs = [measure() for _ in range(_NUM_RUNS)]
        fastest = {key: round(min(run[key] for run in runs), 3) for key in runs[0]}
        print(json.dumps({"measurement": name, **fastest}), flush=True)


if __name__ == "__main__":
    main()
