"""What routers and engine replicas send each other: the call, its reply, and the frames of the token channel.

All of it is msgpack, written and checked by msgspec, so that it costs microseconds and carries no code.
"""

from typing import Any

import msgspec

from llm.serving.schemas import EngineStats, FinishReason, GenerationRequest, StepOutput, TokenLogprobs


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


class GenerateCall(msgspec.Struct):
    """Argument of `EngineReplica.generate`."""

    request: dict[str, Any]
    """Fields of a `GenerationRequest` that differ from their defaults."""
    stream_id: int
    channel: ChannelAddress | None = None
    """Where to push tokens; None to get them with the reply alone."""

    @classmethod
    def of(cls, request: GenerationRequest, stream_id: int, channel: ChannelAddress | None) -> "GenerateCall":
        """The call for a request."""
        fields = request.model_dump(exclude_defaults=True)
        # A default that is drawn, not fixed: always sent, so that the request keeps its identity and its noise.
        fields["request_id"], fields["seed"] = request.request_id, request.seed
        return cls(fields, stream_id, channel)

    def to_request(self) -> GenerationRequest:
        """The request, validated again."""
        return GenerationRequest.model_validate(self.request)


class EmbedCall(msgspec.Struct):
    """Argument of `EngineReplica.embed`."""

    token_ids: list[int]
    pooling: str


class Refusal(msgspec.Struct, frozen=True):
    """Why a request can never be served, as `InvalidRequestError` has it."""

    message: str
    param: str | None = None
    code: str | None = None


class GenerateReply(msgspec.Struct):
    """Result of `EngineReplica.generate`: the authority on what was generated."""

    replica_id: str
    token_ids: list[int] = []
    """Everything generated, what an earlier engine had generated included."""
    logprobs: list[TokenLogprobs] | None = None
    """One entry for each token that this engine generated."""
    end: End | None = None
    """None where the request was refused or the engine broke down."""
    refusal: Refusal | None = None
    failure: str | None = None
    """The engine broke down; another one may go on."""
    timing: EngineTiming | None = None


class EmbedReply(msgspec.Struct):
    """Result of `EngineReplica.embed`: one of the three."""

    vector: list[float] | None = None
    refusal: Refusal | None = None
    failure: str | None = None


_encoder = msgspec.msgpack.Encoder()
_info_decoder = msgspec.msgpack.Decoder(EngineInfo)
_address_decoder = msgspec.msgpack.Decoder(ChannelAddress)
_call_decoder = msgspec.msgpack.Decoder(GenerateCall)
_reply_decoder = msgspec.msgpack.Decoder(GenerateReply)
_embed_call_decoder = msgspec.msgpack.Decoder(EmbedCall)
_embed_reply_decoder = msgspec.msgpack.Decoder(EmbedReply)


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


def decode_embed_call(data: bytes) -> EmbedCall:
    """Read a call for an embedding."""
    return _embed_call_decoder.decode(data)


def decode_embed_reply(data: bytes) -> EmbedReply:
    """Read the reply to it."""
    return _embed_reply_decoder.decode(data)


def end_of(output: StepOutput) -> End | None:
    """How `output` ends its request, if it does."""
    if output.finish_reason is None:
        return None
    return End(output.finish_reason, output.stop_reason, output.num_cached_tokens, output.error)
