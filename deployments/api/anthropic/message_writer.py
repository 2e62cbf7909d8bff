"""Answers of Anthropic's Messages API, whole or streamed.

After https://docs.anthropic.com/en/docs/build-with-claude/streaming.
"""

import json
from collections.abc import Sequence
from typing import Any

from deployments.api.errors import anthropic_error_body
from deployments.api.sse import encode_json
from deployments.chat.choices import Update
from deployments.chat.errors import APIError
from deployments.chat.output import OutputEvent, ReasoningDelta, TextDelta, ToolCallArguments, ToolCallStart
from deployments.chat.turn import Turn

Event = dict[str, Any]


class MessageWriter:
    """Writes one turn of one choice; see `AnswerWriter`.

    Args:
        turn: a turn that has begun or is about to.
        model: model name to give in the answer.
    """

    def __init__(self, turn: Turn, *, model: str) -> None:
        self._turn = turn
        self._model = model
        self._blocks: list[Event] = []
        self._is_open = False

    def begin(self) -> bytes:
        """The events that announce the message."""
        message = {**self._message(), "content": [], "stop_reason": None, "stop_sequence": None,
                   "usage": {**self._usage(), "output_tokens": 1}}  # fmt: skip
        return _written([{"type": "message_start", "message": message}, {"type": "ping"}])

    def write(self, updates: Sequence[Update]) -> bytes:
        """The events for what is new."""
        return _written([event for update in updates for event in self._take(update.events)])

    async def settle(self) -> None:
        """Do nothing: nothing is stored."""

    def end(self) -> bytes:
        """The events that close the last block and the message."""
        last = {"type": "message_delta", "delta": self._stop(), "usage": self._usage()}
        return _written([*self._close(), last, {"type": "message_stop"}])

    def failure(self, error: APIError) -> bytes:
        """The event that reports a failure."""
        return message_failure(error)

    def add(self, updates: Sequence[Update]) -> None:
        """Take in what is new."""
        for update in updates:
            self._take(update.events)

    def whole(self) -> dict[str, Any]:
        """The message."""
        blocks = [self._finished_block(block) for block in self._blocks]
        return {**self._message(), "content": blocks, **self._stop(), "usage": self._usage()}

    @property
    def num_values(self) -> int:
        """Roughly one piece of text per token."""
        return self._turn.num_output_tokens

    def _take(self, events: Sequence[OutputEvent]) -> list[Event]:
        """Take in what is new, and return the events for it."""
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
        """Begin a block of this kind, unless the open block is of this kind."""
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
        """The block with a call's arguments as an object; arguments that were cut off become an empty one."""
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
        choice = self._turn.choices[0]
        if choice.stop_string is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_string}
        reason = "max_tokens" if choice.finish_reason == "length" else "end_turn"
        if reason == "end_turn" and any(block["type"] == "tool_use" for block in self._blocks):
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": None}

    def _usage(self) -> Event:
        """Token counts; Anthropic counts tokens from the cache separately."""
        turn = self._turn
        return {
            "input_tokens": turn.num_prompt_tokens - turn.num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": turn.num_cached_tokens,
            "output_tokens": turn.num_output_tokens,
        }


def message_failure(error: APIError) -> bytes:
    """The event that ends a stream after a failure, whether it has begun or not."""
    return b"event: error\ndata: " + anthropic_error_body(error) + b"\n\n"


def _written(events: Sequence[Event]) -> bytes:
    return b"".join(
        b"event: " + event["type"].encode() + b"\ndata: " + encode_json(event) + b"\n\n" for event in events
    )
