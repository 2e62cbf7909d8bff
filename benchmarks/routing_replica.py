"""An engine replica for `benchmarks.routing_sim`: what it would do and when, computed instead of waited for.

Its memory is the engine's own `SlotPool`. Its steps follow the engine's scheduler: decodes first, then prefill chunks,
first come first served, under one token budget; few newcomers beside many decodes get small chunks. Two things are
simpler: a request's pages for its whole output are taken at admission, so nobody is preempted; and only prompts go
into the prefix cache, since traces do not say what was generated.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush

from benchmarks.routing_trace import BLOCK_TOKENS, TraceRequest
from llm.scheduling.slot_pool import SlotPool
from llm.serving.schemas import EngineStats


@dataclass(frozen=True, slots=True)
class ReplicaSpeed:
    """How fast a replica is, and how large. The defaults are an 8B model in bfloat16 on one H200.

    Measured there: 42,000 prompt tokens a second; decode steps of 4.6, 6.6 and 10.3 ms with 32, 128 and 256 rows of
    1,024 tokens, which is `weights_s` and a time for each token of context; causal attention over 8,192 new tokens in
    1,216 us a layer, 32 layers (decision 6), which is a time for each pair of tokens.
    """

    weights_s: float = 3.8e-3
    """To read the weights: a step takes at least this."""
    decode_context_s: float = 25.4e-9
    """For each token of context of each row that decodes."""
    prefill_token_s: float = 1 / 42_000
    prefill_pair_s: float = 1.16e-9
    """For each new token and token of context that it attends to."""
    num_slots: int = 895_728
    max_rows: int = 256
    max_step_tokens: int = 8192
    prefill_beside_decodes: int = 256
    """Prefill tokens of a step while there is less than one newcomer for `crowd` decodes."""
    crowd: int = 4

    def busy_s(self, request: TraceRequest) -> float:
        """Seconds that a request takes of a replica if nothing is cached; the weights are read for many at once."""
        prompt, output = request.num_prompt_tokens, request.num_output_tokens
        return self.prefill_s(prompt) + (output - 1) * (prompt + output / 2) * self.decode_context_s

    def prefill_s(self, num_tokens: int, num_cached: int = 0) -> float:
        """Seconds to prefill the rest of a prompt, alone."""
        pairs = (num_tokens**2 - num_cached**2) / 2
        return (num_tokens - num_cached) * self.prefill_token_s + pairs * self.prefill_pair_s


@dataclass(slots=True, eq=False)
class SimulatedRequest:
    """A request on its way. Written by the replica that has it.

    Attributes:
        request: as the trace has it.
        stream_id: its number, one for all routers.
        router: index of the router that it came to.
        first_token_s, end_s: when its first and its last token were made.
        num_cached_tokens: of its prompt, found in the prefix cache.
        num_computed: tokens of its prompt that are in memory.
        num_registered: its pages that the prefix cache knows.
        pages: what it holds while it runs.
    """

    request: TraceRequest
    stream_id: int
    router: int
    first_token_s: float = math.inf
    end_s: float = math.inf
    num_cached_tokens: int = 0
    num_computed: int = 0
    num_registered: int = 0
    pages: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps under way: one with `chunks`, or `num_steps` that only decode."""

    start_s: float
    end_s: float
    num_steps: int
    chunks: tuple[tuple[SimulatedRequest, int], ...] = ()


@dataclass(slots=True)
class Outcome:
    """What steps gave: requests with their first token, and requests that have ended."""

    begun: list[SimulatedRequest] = field(default_factory=list)
    ended: list[SimulatedRequest] = field(default_factory=list)


class SimulatedReplica:
    """One replica. The caller keeps the clock: `start` plans the next steps, `finish` is called when they are over.

    Args:
        speed: how fast it is.
    """

    def __init__(self, speed: ReplicaSpeed) -> None:
        self.speed = speed
        self.pool = SlotPool(speed.num_slots // BLOCK_TOKENS, BLOCK_TOKENS)
        self.plan: Plan | None = None
        self.num_served = 0
        self.num_computed_tokens = 0
        self._waiting: deque[SimulatedRequest] = deque()
        self._prefilling: list[SimulatedRequest] = []
        self._decoding: list[tuple[int, int, SimulatedRequest]] = []
        """A heap by the step in which each one ends."""
        self._num_context = 0
        """Tokens that a decode step attends to."""
        self._num_steps = 0

    @property
    def num_open(self) -> int:
        """Requests that it has."""
        return len(self._waiting) + len(self._prefilling) + len(self._decoding)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens still to prefill."""
        prefilling = sum(r.request.num_prompt_tokens - r.num_computed for r in self._prefilling)
        return prefilling + sum(r.request.num_prompt_tokens for r in self._waiting)

    def add(self, request: SimulatedRequest, now: float) -> None:
        """A request arrives. Steps under way that only decode are cut short: the plan's end may be earlier now."""
        self._waiting.append(request)
        plan = self.plan
        if plan is not None and not plan.chunks and plan.num_steps > 1:
            num_steps = min(self._steps_until(now - plan.start_s), plan.num_steps)
            self.plan = Plan(plan.start_s, plan.start_s + self._decode_s(num_steps), num_steps)

    def start(self, now: float) -> Plan | None:
        """Plan the next steps and return them; None if some are under way or there is nothing to do."""
        if self.plan is not None or not self.num_open:
            return None
        chunks = self._chunks()
        num_steps, step_s = 1, 0.0
        if chunks:
            num_tokens = sum(num for _, num in chunks)
            pairs = sum(num * (request.num_computed + num / 2) for request, num in chunks)
            compute_s = max(self.speed.weights_s, num_tokens * self.speed.prefill_token_s)
            step_s = compute_s + pairs * self.speed.prefill_pair_s + self._num_context * self.speed.decode_context_s
        else:
            assert self._decoding, "what waits fits into an empty pool"
            num_steps = self._decoding[0][0] - self._num_steps
            step_s = self._decode_s(num_steps)
        self.plan = Plan(now, now + step_s, num_steps, chunks)
        return self.plan

    def finish(self) -> Outcome:
        """The plan's end has come."""
        plan = self.plan
        assert plan is not None, "no steps are under way"
        self.plan = None
        self._num_steps += plan.num_steps
        self._num_context += plan.num_steps * len(self._decoding)
        outcome = Outcome()
        while self._decoding and self._decoding[0][0] <= self._num_steps:
            self._end(heappop(self._decoding)[2], plan.end_s, outcome)
        for request, num_tokens in plan.chunks:
            self.num_computed_tokens += num_tokens
            request.num_computed += num_tokens
            self._register(request)
            if request.num_computed == request.request.num_prompt_tokens:
                self._prefilling.remove(request)
                self._begin(request, plan.end_s, outcome)
        return outcome

    def stats(self) -> EngineStats:
        """As the engine reports it."""
        return EngineStats(
            num_running=len(self._prefilling) + len(self._decoding),
            num_waiting=len(self._waiting),
            num_waiting_tokens=self.num_waiting_tokens,
            num_free_pages=self.pool.num_free,
            num_used_pages=self.pool.num_used,
            num_cached_pages=self.pool.num_cached,
            num_pages=self.pool.num_pages,
            page_size=self.pool.page_size,
            num_preemptions=0,
            num_generated_tokens=0,
            num_prompt_tokens=0,
            num_cached_prompt_tokens=0,
            max_rows=self.speed.max_rows,
        )

    def _chunks(self) -> tuple[tuple[SimulatedRequest, int], ...]:
        num_decodes = len(self._decoding)
        budget = self.speed.max_step_tokens - num_decodes
        if (len(self._prefilling) + len(self._waiting)) * self.speed.crowd < num_decodes:
            budget = min(budget, self.speed.prefill_beside_decodes)
        chunks = []
        for request in self._prefilling:
            num_tokens = min(request.request.num_prompt_tokens - request.num_computed, budget)
            if num_tokens:
                chunks.append((request, num_tokens))
                budget -= num_tokens
        while budget and self._waiting and self._admit(self._waiting[0]):
            request = self._waiting.popleft()
            self._prefilling.append(request)
            num_tokens = min(request.request.num_prompt_tokens - request.num_computed, budget)
            chunks.append((request, num_tokens))
            budget -= num_tokens
        return tuple(chunks)

    def _admit(self, request: SimulatedRequest) -> bool:
        """Give a request a row, its cached prefix and pages for the rest, if there are any left."""
        if len(self._prefilling) + len(self._decoding) >= self.speed.max_rows:
            return False
        trace, pool = request.request, self.pool
        cached = pool.find_prefix(trace.block_hashes[: (trace.num_prompt_tokens - 1) // BLOCK_TOKENS])
        num_new = pool.pages_for(trace.num_prompt_tokens + trace.num_output_tokens) - len(cached)
        if num_new + pool.count_cached(cached) > pool.num_available:
            return False
        pool.share(cached)
        request.pages = cached + pool.allocate(num_new)
        request.num_registered = len(cached)
        request.num_cached_tokens = request.num_computed = len(cached) * BLOCK_TOKENS
        return True

    def _register(self, request: SimulatedRequest) -> None:
        blocks = request.request.block_hashes
        num_full = min(request.num_computed // BLOCK_TOKENS, len(blocks))
        for i in range(request.num_registered, num_full):
            self.pool.register(request.pages[i], blocks[i])
        request.num_registered = max(num_full, request.num_registered)

    def _begin(self, request: SimulatedRequest, now: float, outcome: Outcome) -> None:
        """A prompt has been prefilled, which gives the first token."""
        request.first_token_s = now
        outcome.begun.append(request)
        self._num_context += request.request.num_prompt_tokens + 1
        num_left = request.request.num_output_tokens - 1
        if num_left:
            heappush(self._decoding, (self._num_steps + num_left, request.stream_id, request))
        else:
            self._end(request, now, outcome)

    def _end(self, request: SimulatedRequest, now: float, outcome: Outcome) -> None:
        request.end_s = now
        self._num_context -= request.request.num_prompt_tokens + request.request.num_output_tokens
        self.pool.release(request.pages)
        request.pages = []
        self.num_served += 1
        outcome.ended.append(request)

    def _decode_s(self, num_steps: int) -> float:
        """Seconds of so many steps that only decode; the context grows by a token a row and step."""
        context = num_steps * self._num_context + len(self._decoding) * num_steps * (num_steps - 1) / 2
        return num_steps * self.speed.weights_s + context * self.speed.decode_context_s

    def _steps_until(self, seconds: float) -> int:
        """Steps that only decode, until one ends no earlier than this; at least one."""
        growth = len(self._decoding) * self.speed.decode_context_s / 2
        linear = self.speed.weights_s + self._num_context * self.speed.decode_context_s - growth
        num_steps = (math.sqrt(linear * linear + 4 * growth * seconds) - linear) / (2 * growth) if seconds > 0 else 0
        return max(1, math.ceil(num_steps - 1e-9))
