"""What routers and engine replicas send each other: the call, its reply, and the frames of the token channel.

All of it is msgpack, written and checked by msgspec, so that it costs microseconds and carries no code.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import msgspec

from llm.serving.schemas import EngineStats, FinishReason, GenerationRequest, StepOutput, TokenLogprobs

_TokenId = Annotated[int, msgspec.Meta(ge=0)]


class ChannelAddress(msgspec.Struct, frozen=True):
    """Where a router listens, and the key to get in. Whoever holds one may connect, so it is never logged."""

    router_id: str
    """Stays the same, whatever address the router listens on."""
    endpoint: str
    server_key: bytes
    """The public half of the router's CURVE key pair, known to the replicas alone."""
    version: int = 0
    """Of several addresses of one router the highest is to be used."""

    def __repr__(self) -> str:
        return f"ChannelAddress({self.router_id}, {self.endpoint}, version {self.version})"


class End(msgspec.Struct, array_like=True, gc=False):
    """How a request ended."""

    reason: FinishReason
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    error: str | None = None


class EngineTiming(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """How long an engine took until a request's first token, in seconds."""

    queue_s: float
    """Until its prompt began to be computed."""
    prefill_s: float
    """From there."""


class TokenItem(msgspec.Struct, array_like=True):
    """New tokens of one stream."""

    stream_id: int
    """The router's number for this stream and attempt."""
    offset: int
    """Output tokens before these, counting what an earlier engine generated."""
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    end: End | None = None
    timing: EngineTiming | None = None
    """With the first tokens."""


class StepFrame(msgspec.Struct, array_like=True, tag="tokens"):
    """What one engine step gave to one router's requests."""

    replica_id: str
    items: list[TokenItem]


class Gpu(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One of a replica's GPUs."""

    index: int
    """As the replica's process counts."""
    name: str
    used_bytes: int
    total_bytes: int
    busy_percent: int | None = None
    """Share of the last second in which it ran any kernel; None where the driver does not say."""


class Machine(msgspec.Struct, array_like=True, frozen=True):
    """Where a replica runs, and what it takes there."""

    node: str
    pid: int
    memory_bytes: int
    """Resident memory of the process."""
    num_cores: int
    """Cores that the process may use."""
    busy_cores: float
    """Of these, how many it kept busy in the last second."""
    gpus: list[Gpu] = []
    """None where the replica runs on a CPU; several where the model is spread over them."""


class Condition(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a replica says of itself, beside its load."""

    fingerprint: str = ""
    """Of the model version that it runs."""
    num_failed_steps: int = 0
    """Engine steps that failed one after the other, up to now."""
    failure: str | None = None
    """Why its engine will never step again; None while it does."""
    has_shut_down: bool = False
    """It has been asked to end, and ends in good order: nothing more will come."""
    machine: Machine | None = None
    """None where it does not say."""


class Report(msgspec.Struct, array_like=True, tag="report"):
    """State of one replica, and how its prefix cache has changed since its last report to this router."""

    replica_id: str
    stats: EngineStats
    added_blocks: list[int] = []
    """`block_hash` of pages that hold a prompt's beginning now."""
    removed_blocks: list[int] = []
    is_snapshot: bool = False
    """`added_blocks` is everything there is; nothing told before counts."""
    received: list[int] = []
    """Streams of this router that have arrived since its last report, which count in `stats` from now on."""
    condition: Condition = Condition()


Frame = StepFrame | Report


def block_hash(page_hash: int) -> int:
    """What a report says of a page: 64 of the 128 bits of `PageHashes`, enough to choose a replica by."""
    return page_hash & 0xFFFF_FFFF_FFFF_FFFF


class EngineInfo(msgspec.Struct, frozen=True):
    """What a router needs to know of the engines behind it, the same for every replica."""

    model: str
    max_seq_len: int
    num_slots: int
    page_size: int
    max_step_tokens: int
    """Tokens that a step computes at most."""
    vocab_size: int
    device: str
    dtype: str
    backend: str
    fingerprint: str = ""
    """Of the model version: model, tokenizer, chat template, adapter and number formats."""
    weight_bytes: int = 0
    """Memory of the weights on each GPU of a replica; 0 where there are none."""
    kv_cache_bytes: int = 0
    """Memory of all slots' keys and values on each GPU of a replica."""
    num_gpus: int = 1
    """GPUs of each replica that hold the model together; on a CPU, processes."""


class GenerateCall(msgspec.Struct):
    """Argument of `EngineReplica.generate`."""

    request: dict[str, Any]
    """Fields of a `GenerationRequest` that differ from their defaults, but for the prompt's ids."""
    prompt_ids: tuple[_TokenId, ...]
    """Checked as they are read, in a third of the time that the request's own check would take."""
    stream_id: int
    channel: ChannelAddress | None = None
    """Where to push tokens; None to get them with the reply alone."""
    fingerprint: str = ""
    """Of the model version that it is for; a replica of another one declines it. "" for whatever version."""
    is_suspect: bool = False
    """It may be what a replica failed of: a replica begins one such request at a time."""

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
        # A default that is drawn, not fixed: always sent, so that the request keeps its identity and its noise.
        fields["request_id"], fields["seed"] = request.request_id, request.seed
        return cls(fields, request.prompt_token_ids, stream_id, channel, fingerprint, is_suspect)

    def to_request(self) -> GenerationRequest:
        """The request, validated again.

        Raises:
            ValueError: something in it is wrong.
        """
        request = GenerationRequest.model_validate({**self.request, "prompt_token_ids": self.prompt_ids[:1]})
        return request.model_copy(update={"prompt_token_ids": self.prompt_ids})


class Refusal(msgspec.Struct, frozen=True):
    """Why a request can never be served, as `InvalidRequestError` has it."""

    message: str
    param: str | None = None
    code: str | None = None


class FailureKind(StrEnum):
    """Why a replica has not finished a request that another one may go on with."""

    FAILED = "failed"
    """The engine, or a step of it, failed."""
    LEAVING = "leaving"
    """The replica is shutting down, or has lost its way to the router."""
    DECLINED = "declined"
    """It has not begun it: it runs another model version, was not named, or has tried another suspect until now."""


class Failure(msgspec.Struct, frozen=True):
    """Why a replica has not finished a request, though another one may go on with it."""

    kind: FailureKind
    message: str


class GenerateReply(msgspec.Struct):
    """Result of `EngineReplica.generate`: the authority on what was generated."""

    replica_id: str
    token_ids: list[int] = []
    """Everything generated, what an earlier engine had generated included."""
    logprobs: list[TokenLogprobs] | None = None
    """One entry for each token that this engine generated."""
    end: End | None = None
    """None where the request was refused or the replica failed."""
    refusal: Refusal | None = None
    failure: Failure | None = None
    """Set where another replica may go on."""
    timing: EngineTiming | None = None
    vector: bytes | None = None
    """Of a request that is pooled, as in `StepOutput`. It comes with the reply alone; the channel tells of the end."""
    prompt_logprobs: bytes | None = None
    """Where the request asked for them, what `pack_logprobs` made of them. They come with the reply alone, too."""


def pack_logprobs(entries: Sequence[TokenLogprobs]) -> bytes:
    """Log probabilities as bytes, which cost those who only pass them on nothing."""
    return _encoder.encode(entries)


def unpack_logprobs(data: bytes) -> list[TokenLogprobs]:
    """What `pack_logprobs` was given."""
    return _logprobs_decoder.decode(data)


_encoder = msgspec.msgpack.Encoder()
_logprobs_decoder = msgspec.msgpack.Decoder(list[TokenLogprobs])
_info_decoder = msgspec.msgpack.Decoder(EngineInfo)
_address_decoder = msgspec.msgpack.Decoder(ChannelAddress)
_call_decoder = msgspec.msgpack.Decoder(GenerateCall)
_reply_decoder = msgspec.msgpack.Decoder(GenerateReply)
_calls_decoder = msgspec.msgpack.Decoder(list[GenerateCall])
_replies_decoder = msgspec.msgpack.Decoder(list[GenerateReply])


def encode(message: Any) -> bytes:
    """Bytes of any of the messages here."""
    return _encoder.encode(message)


def decode_info(data: bytes) -> EngineInfo:
    """Read what a replica says of its engine."""
    return _info_decoder.decode(data)


def decode_address(data: bytes) -> ChannelAddress:
    """Read a router's address."""
    return _address_decoder.decode(data)


def decode_call(data: bytes) -> GenerateCall:
    """Read a call."""
    return _call_decoder.decode(data)


def decode_reply(data: bytes) -> GenerateReply:
    """Read a reply."""
    return _reply_decoder.decode(data)


def decode_calls(data: bytes) -> list[GenerateCall]:
    """Read a batch of calls."""
    return _calls_decoder.decode(data)


def decode_replies(data: bytes) -> list[GenerateReply]:
    """Read the replies to a batch, in order."""
    return _replies_decoder.decode(data)


def end_of(output: StepOutput) -> End | None:
    """How `output` ends its request, if it does."""
    if output.finish_reason is None:
        return None
    return End(output.finish_reason, output.stop_reason, output.num_cached_tokens, output.error)
