"""Messages between routers and engine replicas: the call, its reply, and the frames of the token channel.

All of it is msgpack, written and checked by msgspec, so that it costs microseconds and carries no code.
"""

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Annotated, Any

import msgspec

from llm.serving.schemas import EngineStats, FinishReason, GenerationRequest, StepOutput, TokenLogprobs

_TokenId = Annotated[int, msgspec.Meta(ge=0)]


class ChannelAddress(msgspec.Struct, frozen=True):
    """Where a router listens, and the key to connect. Anyone who holds it may connect, so it is never logged."""

    router_id: str
    """Stays the same whatever address the router listens on."""
    endpoint: str
    server_key: bytes
    """The public half of the router's CURVE key pair, known only to the replicas."""
    version: int = 0
    """If one router has several addresses, the one with the highest version is to be used."""

    def __repr__(self) -> str:
        return f"ChannelAddress({self.router_id}, {self.endpoint}, version {self.version})"


class End(msgspec.Struct, array_like=True, gc=False):
    """How a request ended."""

    reason: FinishReason
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    error: str | None = None


class EngineTiming(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """How long an engine took to produce a request's first token, in seconds."""

    queue_s: float
    """Time until its prompt began to be computed."""
    prefill_s: float
    """Time from then until the first token."""


class TokenItem(msgspec.Struct, array_like=True):
    """New tokens of one stream."""

    stream_id: int
    """The router's number for this stream and attempt."""
    offset: int
    """Number of output tokens before these, including what an earlier engine generated."""
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    end: End | None = None
    timing: EngineTiming | None = None
    """Sent with the first tokens."""


class StepFrame(msgspec.Struct, array_like=True, tag="tokens"):
    """What one engine step produced for one router's requests."""

    replica_id: str
    items: list[TokenItem]


class Gpu(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One of a replica's GPUs."""

    index: int
    """Index of the GPU in the replica's process."""
    name: str
    used_bytes: int
    total_bytes: int
    busy_percent: int | None = None
    """Share of the last second in which it ran any kernel; None where the driver does not say."""


class Machine(msgspec.Struct, array_like=True, frozen=True):
    """Where a replica runs, and what it uses there."""

    node: str
    pid: int
    memory_bytes: int
    """Resident memory of the process."""
    num_cores: int
    """Cores that the process may use."""
    busy_cores: float
    """How many of these it kept busy in the last second."""
    gpus: list[Gpu] = []
    """Empty if the replica runs on a CPU; several if the model is spread over them."""


class Condition(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a replica says about itself, besides its load."""

    fingerprint: str = ""
    """Fingerprint of the model version that it runs."""
    num_failed_steps: int = 0
    """Number of consecutive engine steps that have failed up to now."""
    failure: str | None = None
    """Why its engine will never step again; None while it does."""
    has_shut_down: bool = False
    """It was asked to shut down and is doing so in good order: nothing more will come."""
    machine: Machine | None = None
    """None if it does not say."""


class Report(msgspec.Struct, array_like=True, tag="report"):
    """State of one replica, and how its prefix cache has changed since its last report to this router."""

    replica_id: str
    stats: EngineStats
    added_blocks: list[int] = []
    """`block_hash` of pages that now hold the beginning of a prompt."""
    removed_blocks: list[int] = []
    is_snapshot: bool = False
    """`added_blocks` is everything the cache holds; earlier reports no longer count."""
    received: list[int] = []
    """Streams of this router that arrived since the last report; `stats` counts them from now on."""
    condition: Condition = Condition()


Frame = StepFrame | Report


def block_hash(page_hash: int) -> int:
    """What a report says about a page: 64 of the 128 bits of `PageHashes`, enough for choosing a replica."""
    return page_hash & 0xFFFF_FFFF_FFFF_FFFF


class EngineInfo(msgspec.Struct, frozen=True):
    """What a router needs to know about its engines; the same for every replica."""

    model: str
    max_seq_len: int
    num_slots: int
    page_size: int
    max_step_tokens: int
    """Most tokens that a step computes."""
    vocab_size: int
    device: str
    dtype: str
    backend: str
    fingerprint: str = ""
    """Fingerprint of the model version: model, tokenizer, chat template, adapter and number formats."""
    weight_bytes: int = 0
    """Memory of the weights on each GPU of a replica; 0 if there are no weights."""
    kv_cache_bytes: int = 0
    """Memory of all slots' keys and values on each GPU of a replica."""
    vector_size: int = 0
    """Dimensions of a text's vector."""
    num_labels: int = 0
    """Labels that the model gives to a text; 0 for a model that generates tokens, which is no classifier."""
    num_gpus: int = 1
    """GPUs of each replica that hold the model together; on a CPU, processes."""


class GenerateCall(msgspec.Struct):
    """Argument of `EngineReplica.generate`."""

    request: dict[str, Any]
    """Fields of a `GenerationRequest` that differ from their defaults, except the prompt's ids."""
    prompt_ids: tuple[_TokenId, ...]
    """Checked as they are read, in a third of the time that the request's own check would take."""
    stream_id: int
    channel: ChannelAddress | None = None
    """Where to push tokens; None to get them only with the reply."""
    fingerprint: str = ""
    """Fingerprint of the model version it is for; a replica of another version declines it. "" for any version."""
    is_suspect: bool = False
    """It may have caused a replica to fail: a replica begins one such request at a time."""

    @classmethod
    def of(
        cls,
        request: GenerationRequest,
        stream_id: int,
        channel: ChannelAddress | None,
        fingerprint: str = "",
        *,
        is_suspect: bool = False,
    ) -> "GenerateCall":
        """The call for a request."""
        assert request.prompt_token_ids is not None, "a router sends tokens"
        fields = request.model_dump(exclude_defaults=True, exclude={"prompt_token_ids"})
        # These defaults are random, so they are always sent: the request keeps its identity and its noise.
        fields["request_id"], fields["seed"] = request.request_id, request.seed
        return cls(fields, request.prompt_token_ids, stream_id, channel, fingerprint, is_suspect)

    def to_request(self) -> GenerationRequest:
        """The request, validated again.

        Raises:
            ValueError: one of its fields is not valid.
        """
        request = GenerationRequest.model_validate({**self.request, "prompt_token_ids": self.prompt_ids[:1]})
        return request.model_copy(update={"prompt_token_ids": self.prompt_ids})


class Refusal(msgspec.Struct, frozen=True):
    """Why a request can never be served, as in `InvalidRequestError`."""

    message: str
    param: str | None = None
    code: str | None = None


class FailureKind(StrEnum):
    """Why a replica has not finished a request that another replica may continue."""

    FAILED = "failed"
    """The replica, its engine or a step failed, stalled or died."""
    LEAVING = "leaving"
    """The replica is being taken away or shutting down, or has lost its connection to the router."""
    DECLINED = "declined"
    """The replica has not begun it: it runs another model version, was not named, or was busy trying another
    suspect."""


class Failure(msgspec.Struct, frozen=True):
    """Why a replica has not finished a request, which another replica may continue."""

    kind: FailureKind
    message: str


class GenerateReply(msgspec.Struct):
    """Result of `EngineReplica.generate`: the authority on what was generated."""

    replica_id: str
    token_ids: list[int] = []
    """Everything generated, including what an earlier engine generated."""
    logprobs: list[TokenLogprobs] | None = None
    """One entry for each token that this engine generated."""
    end: End | None = None
    """None if the request was refused or the replica failed."""
    refusal: Refusal | None = None
    failure: Failure | None = None
    """Set if another replica may continue."""
    timing: EngineTiming | None = None
    vector: bytes | None = None
    """Vector that the request gives, as in `StepOutput`. Only the reply carries it; the channel reports the end."""
    prompt_logprobs: bytes | None = None
    """Output of `pack_logprobs`, if the request asked for it. Only the reply carries it, too."""


encode = msgspec.msgpack.Encoder().encode
"""Encodes any of the messages in this module."""
decode_info = msgspec.msgpack.Decoder(EngineInfo).decode
decode_address = msgspec.msgpack.Decoder(ChannelAddress).decode
decode_call = msgspec.msgpack.Decoder(GenerateCall).decode
decode_calls = msgspec.msgpack.Decoder(list[GenerateCall]).decode
decode_reply = msgspec.msgpack.Decoder(GenerateReply).decode
decode_replies = msgspec.msgpack.Decoder(list[GenerateReply]).decode
pack_logprobs: Callable[[Sequence[TokenLogprobs]], bytes] = encode
"""Log probabilities as bytes, which cost nothing to pass on."""
unpack_logprobs = msgspec.msgpack.Decoder(list[TokenLogprobs]).decode


def end_of(output: StepOutput) -> End | None:
    """How `output` ends its request, if it does."""
    if output.finish_reason is None:
        return None
    return End(output.finish_reason, output.stop_reason, output.num_cached_tokens, output.error)
