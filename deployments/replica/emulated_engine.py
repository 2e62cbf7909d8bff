"""An engine without a model: it makes tokens at a set pace, to measure and test everything around an engine."""

import os
import signal
import time
import zlib
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deployments.model_config import EmulatedFault, EmulationConfig
from deployments.replica.emulated_adapters import EmulatedAdapters
from llm.config import EngineConfig
from llm.errors import EngineError, InvalidRequestError
from llm.scheduling.prefix_cache import PageHashes
from llm.scheduling.slot_pool import SlotPool
from llm.serving.schemas import (
    EngineStats,
    FinishReason,
    GenerationRequest,
    Pooling,
    StepFailure,
    StepOutput,
    TokenLogprobs,
)

_FIRST_TOKEN = 97
_NUM_TOKENS = 26
VECTOR_SIZE = 16
_HANG_S = 3600.0


@dataclass(slots=True)
class _Row:
    """One request in the emulated batch."""

    request: GenerationRequest
    prompt: tuple[int, ...]
    num_output: int
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0
    queue_s: float = 0.0
    added_at: float = field(default_factory=time.monotonic)
    fingerprint: int = field(init=False)

    def __post_init__(self) -> None:
        self.fingerprint = sum((i + 1) * token for i, token in enumerate(self.prompt[-64:]))
        if self.request.adapter is not None:
            self.fingerprint += zlib.crc32(self.request.adapter.digest.encode())


class EmulatedEngine:
    """Stands in for `ContinuousBatchingEngine`: it has the same methods and computes nothing.

    A step lasts `1 / tokens_per_s` plus the time that its prompts take at `prefill_tokens_per_s`, and gives one token
    to each running request. Token ids are lower-case ASCII letters that depend only on model version, adapter, prompt
    and position, so a request that continues in another engine gets the same tokens. Prompts with a common beginning
    share pages as in a real engine, and shared pages take no time. A request whose adapter is not loaded waits for it,
    while others run. A vector depends only on version, adapter and prompt, and is ready after one step.

    Args:
        config: rows, page size and number of pages; the default number of pages is what all rows need at once.
        emulation: pace, context length, and what breaks it.
        vocab_size: prompts with ids at or above it are refused.
        version: of the pretended model.
        num_labels: of the pretended model if it is a classifier; otherwise 0.
    """

    def __init__(
        self,
        config: EngineConfig,
        emulation: EmulationConfig,
        *,
        vocab_size: int = 32_000,
        version: int = 0,
        num_labels: int = 0,
    ) -> None:
        self.config = config
        self.emulation = emulation
        self.max_seq_len = min(config.max_seq_len or emulation.max_seq_len, emulation.max_seq_len)
        pages_a_row = -(-self.max_seq_len // config.page_size)
        self.pool = SlotPool(config.num_pages or config.batch_size("cpu") * pages_a_row, config.page_size)
        self.vocab_size = vocab_size
        self._version = version
        self._num_labels = num_labels
        self._adapters = EmulatedAdapters(config.max_adapters, emulation.adapter_load_s)
        self._fault_file = Path(emulation.fault_dir) / str(os.getpid()) if emulation.fault_dir is not None else None
        self._waiting: deque[_Row] = deque()
        self._running: dict[str, _Row] = {}
        self._num_generated = 0
        self._num_prompt = 0
        self._num_cached_prompt = 0
        self._next_step_at = 0.0

    @property
    def scheduler(self) -> "EmulatedEngine":
        """The engine itself, which does its own scheduling."""
        return self

    @property
    def has_pending_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting or self._running)

    @property
    def num_slots(self) -> int:
        """Tokens that the pretended pool holds."""
        return self.pool.num_pages * self.config.page_size

    @property
    def is_classifier(self) -> bool:
        """See `Engine`."""
        return self._num_labels > 0

    @property
    def failure(self) -> str | None:
        """Always None: it has no parts that could fail by themselves."""
        return None

    def close(self) -> None:
        """Do nothing: there is nothing to end."""

    def add_request(self, request: GenerationRequest) -> str:
        """Accept a request; its tokens come out of `step`.

        Raises:
            InvalidRequestError: it has no token ids, too many of them, or ids outside the vocabulary; or it has an
                adapter, and the engine holds none.
        """
        prompt = request.prompt_token_ids
        if prompt is None:
            raise InvalidRequestError("this engine has no tokenizer; give prompt_token_ids", param="prompt")
        if request.grammar is not None:
            raise InvalidRequestError("the emulated engine follows no grammar", param="grammar")
        if request.adapter is not None and not self.config.max_adapters:
            raise InvalidRequestError("this engine takes no adapters: engine.max_adapters is 0", param="model")
        if max(prompt) >= self.vocab_size:
            raise InvalidRequestError(f"token id {max(prompt)} is beyond the vocabulary", param="prompt")
        if len(prompt) + len(request.output_token_ids) >= min(self.max_seq_len, self.num_slots):
            raise InvalidRequestError(
                f"the prompt has {len(prompt)} tokens; the context is {self.max_seq_len} tokens",
                param="prompt",
                code="context_length_exceeded",
            )
        self._waiting.append(_Row(request, prompt, len(request.output_token_ids)))
        return request.request_id

    def unload_adapter(self, digest: str) -> bool:
        """Give up an adapter unless a request has it, in which case routers ask again; False if it is not held."""
        rows = [*self._running.values(), *self._waiting]
        return self._adapters.unload(digest, {row.request.adapter.digest for row in rows if row.request.adapter})

    def abort(self, request_id: str) -> bool:
        """Give up a request; False if it has ended or is unknown."""
        row = self._running.pop(request_id, None)
        if row is not None:
            self.pool.release(row.pages)
            return True
        for waiting in self._waiting:
            if waiting.request.request_id == request_id:
                self._waiting.remove(waiting)
                return True
        return False

    def step(self) -> list[StepOutput]:
        """Wait for the step's end and return its tokens."""
        now = time.monotonic()
        if not self._running:
            self._next_step_at = now
        num_prefill = self._admit()
        duration = 1 / self.emulation.tokens_per_s + num_prefill / self.emulation.prefill_tokens_per_s
        # Paced by the clock, not by sleeping a fixed time, so that work between two steps does not slow the stream.
        self._next_step_at = max(self._next_step_at, now - duration) + duration
        time.sleep(max(0.0, self._next_step_at - now))
        rows = list(self._running.values())
        if self._suffer(self._find_fault()):
            return [self._fail(row) for row in rows]
        outputs = [self._pool(row) if row.request.gives_vector else self._advance(row) for row in rows]
        self._num_generated += sum(len(output.token_ids) for output in outputs)
        return outputs

    def stats(self) -> EngineStats:
        """State between two steps."""
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_waiting_tokens=sum(len(row.prompt) for row in self._waiting),
            num_free_pages=self.pool.num_free,
            num_used_pages=self.pool.num_used,
            num_cached_pages=self.pool.num_cached,
            num_pages=self.pool.num_pages,
            page_size=self.config.page_size,
            num_preemptions=0,
            num_generated_tokens=self._num_generated,
            num_prompt_tokens=self._num_prompt,
            num_cached_prompt_tokens=self._num_cached_prompt,
            max_rows=self.config.batch_size("cpu"),
            adapters=self._adapters.digests,
        )

    def _find_fault(self) -> EmulatedFault | None:
        """What breaks this step, if anything does."""
        emulation = self.emulation
        if self._fault_file is not None and self._fault_file.exists():
            return EmulatedFault(self._fault_file.read_text().strip())
        if emulation.poison_token_id is None:
            return None
        poisons = (
            row.num_output >= emulation.poison_after
            for row in self._running.values()
            if emulation.poison_token_id in row.prompt
        )
        return emulation.poison if any(poisons) else None

    def _suffer(self, fault: EmulatedFault | None) -> bool:
        """Break in the given way; True if only this step fails.

        Raises:
            EngineError: the engine is broken for good.
        """
        if fault is EmulatedFault.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        if fault is EmulatedFault.HANG:
            time.sleep(_HANG_S)
        if fault is EmulatedFault.BREAK:
            raise EngineError("the emulated engine was told to break")
        return fault is EmulatedFault.FAIL

    def _fail(self, row: _Row) -> StepOutput:
        """End a request whose step failed."""
        del self._running[row.request.request_id]
        self.pool.release(row.pages)
        return StepOutput(
            row.request.request_id,
            (),
            finish_reason=FinishReason.ERROR,
            error="the emulated engine was told to fail",
            step_failure=StepFailure.STEP,
        )

    def _admit(self) -> int:
        """Move waiting requests to free rows; return the number of their tokens that are not cached."""
        num_tokens = 0
        in_use = {row.request.adapter.digest for row in self._running.values() if row.request.adapter is not None}
        for row in list(self._waiting):
            adapter = row.request.adapter
            if len(self._running) >= self.config.batch_size("cpu"):
                break
            if adapter is not None and not self._adapters.use(adapter.digest, in_use):
                continue
            if not self._take_pages(row):
                break
            self._waiting.remove(row)
            if adapter is not None:
                in_use.add(adapter.digest)
            self._running[row.request.request_id] = row
            self._num_prompt += len(row.prompt)
            self._num_cached_prompt += row.num_cached
            row.queue_s = time.monotonic() - row.added_at
            num_tokens += len(row.prompt) - row.num_cached + row.num_output
        return num_tokens

    def _take_pages(self, row: _Row) -> bool:
        """Take pages for the row's greatest length, sharing the prompt's cached ones; False if there are too few."""
        pool, page_size = self.pool, self.config.page_size
        num_new_tokens = 0 if row.request.gives_vector else row.request.max_new_tokens
        longest = min(len(row.prompt) + num_new_tokens, self.max_seq_len)
        num_pages = min(pool.pages_for(longest), pool.num_pages)
        # At least one token is left to compute, as in a real engine.
        hashes = PageHashes(page_size, row.request.page_salt).extend(row.prompt, len(row.prompt) - 1)
        may_share = self.config.enable_prefix_caching and row.request.pooling is not Pooling.MEAN
        shared = pool.find_prefix(hashes) if may_share else []
        pool.share(shared)
        if pool.num_available < num_pages - len(shared):
            pool.release(shared)
            return False
        row.pages = shared + pool.allocate(num_pages - len(shared))
        row.num_cached = len(shared) * page_size
        if self.config.enable_prefix_caching:
            for page, content in list(zip(row.pages, hashes, strict=False))[len(shared) :]:
                pool.register(page, content)
        return True

    def _pool(self, row: _Row) -> StepOutput:
        """The vector of a row's prompt, its last output."""
        del self._running[row.request.request_id]
        self.pool.release(row.pages)
        number = 1 + (self._version + row.fingerprint) % 1009
        if row.request.scores_allowed:
            vector = -1 - np.cos(np.arange(1, len(row.request.allowed_token_ids or ()) + 1) * number)
        elif row.request.pooling is Pooling.LABELS:
            vector = np.cos(np.arange(1, self._num_labels + 1) * number)
        else:
            vector = np.cos(np.arange(1, VECTOR_SIZE + 1) * number)
            vector /= np.linalg.norm(vector)
        return StepOutput(
            row.request.request_id,
            (),
            finish_reason=FinishReason.STOP,
            num_prompt_tokens=len(row.prompt),
            num_cached_tokens=row.num_cached,
            queue_s=row.queue_s,
            vector=vector.astype(np.float32).tobytes(),
        )

    def _advance(self, row: _Row) -> StepOutput:
        request = row.request
        token_id = (
            _FIRST_TOKEN + (self._version + row.fingerprint + row.num_output * 7 + row.num_output // 5) % _NUM_TOKENS
        )
        row.num_output += 1
        reason = None
        stop_reason = None
        if token_id in request.stop_token_ids and row.num_output > request.min_new_tokens:
            reason, stop_reason = FinishReason.STOP, token_id
        elif row.num_output >= request.max_new_tokens or len(row.prompt) + row.num_output >= self.max_seq_len:
            reason = FinishReason.LENGTH
        if reason is not None:
            del self._running[request.request_id]
            self.pool.release(row.pages)
        logprobs = None
        if request.logprobs is not None:
            top = tuple((_FIRST_TOKEN + i, -1.0 - i) for i in range(request.logprobs))
            logprobs = (TokenLogprobs(token_id, -0.5, top),)
        return StepOutput(
            request.request_id,
            (token_id,) if request.max_new_tokens else (),
            logprobs=logprobs,
            finish_reason=reason,
            stop_reason=stop_reason,
            num_prompt_tokens=len(row.prompt),
            num_cached_tokens=row.num_cached,
            queue_s=row.queue_s,
        )
