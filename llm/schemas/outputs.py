"""What comes out of an engine: outputs of steps, whole answers, and the engine's state."""

from dataclasses import dataclass
from enum import StrEnum

import msgspec


class FinishReason(StrEnum):
    """Why a request ended. Every accepted request ends with exactly one."""

    STOP = "stop"
    """A stop id, a stop string or the model's end of sequence; or the requested vector is complete."""
    LENGTH = "length"
    """`max_new_tokens` or the context length."""
    ABORT = "abort"
    """The caller aborted it."""
    ERROR = "error"
    """The engine failed; `error` says how."""


class StepFailure(StrEnum):
    """What failed when a request ended because its step failed, through no fault of its own."""

    STEP = "step"
    """This step; a later one may succeed."""
    DEVICE = "device"
    """The device: no later step of this process can succeed either."""


class AdapterFailure(StrEnum):
    """Why a request ended because of its adapter, before anything of it ran. The engine is well."""

    UNREADABLE = "adapter_not_loaded"
    """Its files are missing or damaged, or hold something that the engine or the model cannot do."""
    CHANGED = "adapter_changed"
    """Its files are not those of the digest."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one output position, of the model's distribution before temperature and cuts."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log probability) of the likeliest tokens, likeliest first."""


class StepOutput(msgspec.Struct, frozen=True, gc=False):
    """What one engine step added to one request. (Not a dataclass, which takes ten times as long.)"""

    request_id: str
    token_ids: tuple[int, ...]
    """New tokens in order; empty if the step only ended the request."""
    text: str = ""
    """New text, only complete characters; always empty in an engine without a tokenizer."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One entry for each of `token_ids`, if the request asked for them."""
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    """In a request's first output, if requested: one entry for each token of the prompt but the first."""
    finish_reason: FinishReason | None = None
    """Set in a request's last output and in no other."""
    stop_reason: int | str | None = None
    """The stop id or stop string that ended it, if one did; None for the model's own end of sequence."""
    num_prompt_tokens: int = 0
    """Tokens of the prompt, the same in every output of a request."""
    num_cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""
    queue_s: float = 0.0
    """Seconds the request waited in the engine before a step began its prompt, the same in each of its outputs."""
    error: str | None = None
    """What went wrong, with `FinishReason.ERROR`."""
    step_failure: StepFailure | None = None
    """Set if the whole step failed: the same request may succeed in another engine."""
    adapter_failure: AdapterFailure | None = None
    """Set if the request's adapter could not be loaded."""
    vector: bytes | None = None
    """The prompt's vector, as 32-bit floats: `numpy.frombuffer(vector, numpy.float32)`. One made of hidden states has
    length 1; one of labels has a logit for each. None if tokens are generated."""

    def joined(self, later: "StepOutput") -> "StepOutput":
        """This output and what the same step added after it, as one."""
        return msgspec.structs.replace(
            later,
            token_ids=self.token_ids + later.token_ids,
            text=self.text + later.text,
            logprobs=None if self.logprobs is None else self.logprobs + (later.logprobs or ()),
            prompt_logprobs=self.prompt_logprobs,
        )


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A whole answer: the sum of a request's step outputs.

    Like them, the answer to a resumed request holds what this engine generated: `token_ids`, `text` and `logprobs`
    begin after the request's `output_token_ids`, which the caller has.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One entry for each of `token_ids`, if the request asked for them."""
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    """One entry for each token of the prompt but the first, if the request asked for them."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    error: str | None = None
    adapter_failure: AdapterFailure | None = None
    """As in `StepOutput`."""
    vector: bytes | None = None
    """As in `StepOutput`."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """State of an engine between two steps. `num_free_pages + num_used_pages + num_cached_pages = num_pages`."""

    num_running: int
    """Sequences that hold a row."""
    num_waiting: int
    """Sequences that wait for a row, including preempted ones."""
    num_waiting_tokens: int
    """Tokens still to prefill, of running and waiting sequences together."""
    num_free_pages: int
    num_used_pages: int
    num_cached_pages: int
    """Pages that no sequence uses, kept for their content; evicted when pages are needed."""
    num_pages: int
    page_size: int
    num_preemptions: int
    """Since the engine started."""
    num_generated_tokens: int
    """Since the engine started."""
    num_prompt_tokens: int
    """Prompt tokens of requests admitted since the engine started."""
    num_cached_prompt_tokens: int
    """Of those, how many came from the prefix cache."""
    max_rows: int = 0
    """Sequences that may hold a row at once."""
    num_proposed_tokens: int = 0
    """Tokens guessed and run by speculation, since the engine started."""
    num_accepted_tokens: int = 0
    """Of those, how many matched the token drawn."""
    adapters: tuple[str, ...] = ()
    """Digests of the adapters that are on the device or in host memory: requests for them need not wait for files."""
