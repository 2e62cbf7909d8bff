"""A message of the Messages API, put together from a turn's events, and the events that it is streamed as.

After https://docs.anthropic.com/en/docs/build-with-claude/streaming.
"""

import json
import logging
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from deployments.api.anthropic.errors import error_body
from deployments.api.sse import encode_json
from deployments.chat.errors import APIError, internal
from deployments.chat.output import OutputEvent, ReasoningDelta, TextDelta, ToolCallArguments, ToolCallStart
from deployments.chat.turn import Turn

logger = logging.getLogger("ray.serve")

Event = dict[str, Any]


class MessageBuilder:
    """Follows a turn.

    Args:
        turn: to be followed.
        model: name to give.
    """

    def __init__(self, turn: Turn, *, model: str) -> None:
        self._turn = turn
        self._model = model
        self._blocks: list[Event] = []
        self._is_open = False

    async def whole(self) -> dict[str, Any]:
        """Wait for the end; the message.

        Raises:
            APIError: the generation failed.
        """
        await self._turn.begin()
        async for events in self._turn.events():
            self._take(events)
        blocks = [self._finished_block(block) for block in self._blocks]
        return {**self._message(), "content": blocks, **self._stop(), "usage": self._usage()}

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events. The turn has begun."""
        message = {**self._message(), "content": [], "stop_reason": None, "stop_sequence": None,
                   "usage": {**self._usage(), "output_tokens": 1}}  # fmt: skip
        yield _written([{"type": "message_start", "message": message}, {"type": "ping"}])
        try:
            async for events in self._turn.events():
                yield _written(self._take(events))
        except APIError as error:
            yield b"event: error\ndata: " + error_body(error) + b"\n\n"
            return
        except Exception:  # too late for an HTTP error, but a stream is never just cut
            logger.exception("a stream failed")
            yield b"event: error\ndata: " + error_body(internal()) + b"\n\n"
            return
        last = {"type": "message_delta", "delta": self._stop(), "usage": self._usage()}
        yield _written([*self._close(), last, {"type": "message_stop"}])

    def _take(self, events: Sequence[OutputEvent]) -> list[Event]:
        """Take in what is new; the events that tell it."""
        told: list[Event] = []
        for event in events:
            match event:
                case TextDelta(text):
                    told += self._open("text", text="") + self._add("text", "text_delta", "text", text)
                case ReasoningDelta(text):
                    told += self._open("thinking", thinking="", signature="")
                    told += self._add("thinking", "thinking_delta", "thinking", text)
                case ToolCallStart(_, call_id, name):
                    told += self._close() + self._open("tool_use", id=call_id, name=name, input={})
                    self._blocks[-1]["json"] = ""
                case ToolCallArguments(_, text):
                    told += self._add("json", "input_json_delta", "partial_json", text)
        return told

    def _open(self, kind: str, **fields: Any) -> list[Event]:
        """Begin a block of this kind, unless it is the one that goes on."""
        if self._is_open and self._blocks[-1]["type"] == kind:
            return []
        told = self._close()
        self._blocks.append({"type": kind, **fields})
        self._is_open = True
        block = {"type": kind, **fields}
        return [*told, {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block}]

    def _add(self, field: str, kind: str, name: str, text: str) -> list[Event]:
        self._blocks[-1][field] += text
        delta = {"type": kind, name: text}
        return [{"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}]

    def _close(self) -> list[Event]:
        if not self._is_open:
            return []
        self._is_open = False
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}]

    def _finished_block(self, block: Event) -> Event:
        """With a call's arguments as an object; what was cut off is left empty."""
        if "json" not in block:
            return block
        try:
            arguments = json.loads(block["json"])
        except ValueError:
            arguments = {}
        return {**{key: value for key, value in block.items() if key != "json"}, "input": arguments}

    def _message(self) -> Event:
        return {"id": f"msg_{self._turn.generation_id}", "type": "message", "role": "assistant", "model": self._model}

    def _stop(self) -> Event:
        choice = self._turn.choice
        if choice.stop_string is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_string}
        reason = "max_tokens" if choice.finish_reason == "length" else "end_turn"
        if reason == "end_turn" and any(block["type"] == "tool_use" for block in self._blocks):
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": None}

    def _usage(self) -> Event:
        """Anthropic counts tokens from the cache apart."""
        choice = self._turn.choice
        return {
            "input_tokens": choice.num_prompt_tokens - choice.num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": choice.num_cached_tokens,
            "output_tokens": choice.num_tokens,
        }


def _written(events: Sequence[Event]) -> bytes:
    return b"".join(
        b"event: " + event["type"].encode() + b"\ndata: " + encode_json(event) + b"\n\n" for event in events
    )
