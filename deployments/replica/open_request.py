"""`OpenRequest`: what a request that the engine runs has been given so far."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from deployments.channel.messages import End, EngineTiming, GenerateReply, end_of, pack_logprobs
from deployments.channel.sender import OutgoingStream
from llm.serving.schemas import StepOutput, TokenLogprobs


@dataclass(slots=True)
class OpenRequest:
    """A request that the engine runs, and all its tokens. Only the engine's thread touches it."""

    resolve: Callable[[GenerateReply], None]
    token_ids: list[int]
    stream: OutgoingStream | None
    """Where its tokens go as they are generated; None for the reply alone."""
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: bytes | None = None
    received_at: float = field(default_factory=time.monotonic)
    timing: EngineTiming | None = None

    def take(self, output: StepOutput) -> End | None:
        """Add what a step gave it, and send that on; returns the request's end if this was the last output."""
        self.token_ids.extend(output.token_ids)
        if output.logprobs is not None:
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs.extend(output.logprobs)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = pack_logprobs(output.prompt_logprobs)
        end = end_of(output)
        timing = None
        if self.timing is None and (output.token_ids or output.vector):
            elapsed = time.monotonic() - self.received_at
            timing = self.timing = EngineTiming(output.queue_s, max(0.0, elapsed - output.queue_s))
        if self.stream is not None:
            self.stream.push(output.token_ids, output.logprobs, end, timing)
        return end

    def reply(self, replica_id: str, end: End, vector: bytes | None) -> GenerateReply:
        """The whole result, once the request has ended."""
        return GenerateReply(
            replica_id, self.token_ids, self.logprobs, end,
            timing=self.timing, vector=vector, prompt_logprobs=self.prompt_logprobs,
        )  # fmt: skip
