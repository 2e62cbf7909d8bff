"""What goes into an engine: a prompt and how to continue it, or which vector to make of it."""

import secrets
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, model_validator

from llm.config import MAX_TOP_LOGPROBS, StrictModel

INT64_MAX = 2**63 - 1

TokenId = Annotated[int, Field(ge=0, strict=True)]
Bias = Annotated[float, Field(ge=-1e9, le=1e9, strict=True)]
"""At its bounds the bias alone decides, and its sum with a logit still fits a float32."""


def new_request_id() -> str:
    """Draw a random id for a request."""
    return secrets.token_hex(12)


def new_seed() -> int:
    """Draw a sampling seed for a request that has none."""
    return secrets.randbits(63)


class Pooling(StrEnum):
    """Which of a prompt's final hidden states make its vector, and how."""

    LAST = "last"
    """The last token's."""
    MEAN = "mean"
    """The average over all tokens."""
    LABELS = "labels"
    """Logits of a classifier's labels, computed from the last token's; the vector is not normalized."""


class GrammarKind(StrEnum):
    """How a grammar is written."""

    JSON_OBJECT = "json_object"
    """Any JSON object; there is nothing to write."""
    JSON_SCHEMA = "json_schema"
    """As a JSON schema."""
    REGEX = "regex"
    """As a regular expression that the whole output matches."""
    CHOICE = "choice"
    """As a JSON list of strings; the output is one of them."""
    LARK = "lark"
    """In llguidance's variant of Lark."""
    CALLS = "calls"
    """As JSON of `llm.sampling.tagged_calls.TaggedCalls`: free text, and calls to tools that follow their schemas."""


class Preamble(StrictModel):
    """Free text before the part that a grammar constrains: what a model thinks before it answers.

    Tags may hold special tokens, written as their names.
    """

    opening: str = ""
    """Tag that begins it; empty if the prompt has already begun it."""
    closing: str = Field(min_length=1)
    """Tag that ends it. Up to two line breaks may follow."""
    lead: str = ""
    """Text that always precedes the constrained part."""
    is_optional: bool = False
    """Whether the whole preamble may be left out."""


class Grammar(StrictModel):
    """What an output must look like, from its first token to its last.

    `max_new_tokens` and stop strings may cut the output before it is complete.
    """

    kind: GrammarKind
    text: str = ""
    is_lenient: bool = False
    """Leave out keywords of a JSON schema that cannot be followed, instead of refusing them."""
    preamble: Preamble | None = None
    """What comes before the constrained part."""


class AdapterRef(StrictModel):
    """A low-rank adapter that a request is answered with: which one, and where its files are.

    The engine reads it from `path` unless it has an adapter of the same digest. Requests whose adapters have equal
    digests share one copy of its weights, and pages of the prefix cache.
    """

    name: str = Field(min_length=1, max_length=256)
    """Name of the adapter, for messages."""
    path: str = Field(min_length=1, max_length=4096)
    """Directory of a PEFT adapter, on the engine's machine."""
    origin: str | None = Field(default=None, max_length=4096)
    """Where the files come from if `path` is not there: `org/name@revision` on the Hub; None for nowhere else."""
    digest: str = Field(min_length=1, max_length=256)
    """Fingerprint of the content of its files. It alone says which adapter this is."""


class GenerationRequest(StrictModel):
    """One prompt and how to continue it, or which vector to make of it.

    Exactly one of `prompt` and `prompt_token_ids` is given. The same request gives the same tokens whether it runs
    alone, batched, preempted or resumed, because the noise of each draw depends only on `(seed, position)`. A request
    without a seed is given one here, and keeps it when it is resumed.
    """

    request_id: str = Field(default_factory=new_request_id, min_length=1, max_length=256)
    prompt: str | None = None
    prompt_token_ids: tuple[TokenId, ...] | None = None
    output_token_ids: tuple[TokenId, ...] = ()
    """Tokens that a failed engine already generated; generation continues after them, and they are not sent again."""

    max_new_tokens: int = Field(default=128, ge=0)
    """Most tokens to generate, including `output_token_ids`; 0 to only compute the prompt."""
    min_new_tokens: int = Field(default=0, ge=0)
    """No stop of any kind before this many tokens."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end the output; the text ends before the first of them."""
    stop_token_ids: tuple[TokenId, ...] = ()
    """Token ids that end the output, in addition to the model's own end-of-sequence ids."""
    ignore_eos: bool = False
    """Continue past end-of-sequence ids, up to `max_new_tokens`."""

    temperature: float = Field(default=1.0, ge=0)
    """0 for greedy."""
    top_k: int | None = Field(default=None, ge=1)
    """Draw from the k likeliest tokens; None for all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the smallest set of tokens that holds this much probability (Holtzman et al. 2019)."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Drop tokens less likely than this share of the likeliest one (Nguyen et al. 2024)."""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Subtracted from the logit of every token that the output already holds."""
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Subtracted from the logit of a token once for each of its occurrences in the output."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Divides positive (multiplies negative) logits of tokens in the prompt or output (Keskar et al. 2019)."""
    logit_bias: Mapping[TokenId, Bias] = Field(default_factory=dict)
    """Added to the logits of these token ids."""
    allowed_token_ids: tuple[TokenId, ...] | None = Field(default=None, min_length=1)
    """The only ids that may be drawn; None for all."""
    seed: int = Field(default_factory=new_seed, ge=-INT64_MAX - 1, le=INT64_MAX)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    """None for no log probabilities; otherwise those of each sampled token and of this many of the likeliest."""
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    """None for no log probabilities of the prompt; otherwise those of each of its tokens but the first, and of this
    many of the likeliest in its place. Such a prompt is computed whole, regardless of what the prefix cache holds."""
    cache_salt: str = Field(default="", max_length=256)
    """The prefix cache shares pages only among requests with the same salt."""
    grammar: Grammar | None = None
    """What the output must look like; None for anything."""
    adapter: AdapterRef | None = None
    """The adapter that computes this request; None for the model itself."""
    scores_allowed: bool = False
    """Whether the request's only output, its vector, is the log probability of each of `allowed_token_ids` after the
    prompt, in their order; `max_new_tokens` must be 0."""
    pooling: Pooling | None = None
    """Which hidden states make the prompt's vector, the request's only output; None to generate tokens. With a vector,
    the generation settings are ignored."""

    @model_validator(mode="after")
    def _check_prompt(self) -> Self:
        if (self.prompt is None) == (self.prompt_token_ids is None):
            raise ValueError("give exactly one of prompt and prompt_token_ids")
        if self.prompt_token_ids is not None and not self.prompt_token_ids:
            raise ValueError("prompt_token_ids is empty; generation needs at least one token")
        if self.output_token_ids and len(self.output_token_ids) >= self.max_new_tokens:
            raise ValueError("output_token_ids holds max_new_tokens already; there is nothing left to generate")
        if self.grammar is not None and (self.ignore_eos or self.min_new_tokens):
            raise ValueError("a grammar says where an output ends: leave out ignore_eos and min_new_tokens")
        if self.grammar is not None and self.allowed_token_ids is not None:
            raise ValueError("a grammar says which tokens may come: leave out allowed_token_ids")
        wants_logprobs = self.logprobs is not None or self.prompt_logprobs is not None
        if self.scores_allowed:
            self._check_scores()
        if self.pooling is not None and (self.output_token_ids or self.grammar or wants_logprobs):
            raise ValueError("pooling gives a vector: leave out output_token_ids, grammar, logprobs, prompt_logprobs")
        return self

    def _check_scores(self) -> None:
        ids = self.allowed_token_ids or ()
        if not 0 < len(set(ids)) == len(ids) <= MAX_TOP_LOGPROBS:
            raise ValueError(f"scores_allowed needs 1 to {MAX_TOP_LOGPROBS} allowed_token_ids, each of them once")
        if self.max_new_tokens or self.logprobs is not None or self.prompt_logprobs is not None or self.pooling:
            raise ValueError(
                "scores_allowed generates nothing: set max_new_tokens to 0, "
                "leave out logprobs, prompt_logprobs and pooling"
            )

    @property
    def gives_vector(self) -> bool:
        """Whether its only output is a vector: of hidden states, of labels, or of scores."""
        return self.pooling is not None or self.scores_allowed

    @property
    def num_draw_logprobs(self) -> int | None:
        """How many log probabilities a draw gives besides the drawn token's; None for none at all."""
        return len(self.allowed_token_ids or ()) if self.scores_allowed else self.logprobs

    @property
    def page_salt(self) -> bytes:
        """What `PageHashes` takes: pages depend on the adapter as well. 0xff, which UTF-8 never has, keeps the two
        apart."""
        salt = self.cache_salt.encode()
        return salt if self.adapter is None else b"\xff" + self.adapter.digest.encode() + b"\xff" + salt

    @property
    def uses_penalties(self) -> bool:
        """Whether draws depend on which tokens came before."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def draws_plainly(self) -> bool:
        """Whether no draw needs more than temperature, cuts and noise."""
        is_bound = self.grammar is not None or self.allowed_token_ids is not None
        is_biased = bool(self.logit_bias) or self.min_new_tokens > 0
        return not (self.uses_penalties or is_biased or is_bound or self.logprobs is not None)
