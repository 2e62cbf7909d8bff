"""Answers of OpenAI's Responses API, whole or streamed.

After OpenAI's reference, https://platform.openai.com/docs/api-reference/responses-streaming.
"""

import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from deployments.api.openai.logprobs import TextLogprobs
from deployments.api.openai.response_items import seal_thoughts
from deployments.api.openai.response_tools import FunctionNames
from deployments.api.sse import encode_json
from deployments.chat.choices import Update
from deployments.chat.errors import APIError
from deployments.chat.output import ReasoningDelta, TextDelta, ToolCallArguments, ToolCallStart
from deployments.chat.turn import Turn

Event = dict[str, Any]


class ResponseWriter:
    """Writes one turn of one choice; see `AnswerWriter`.

    Args:
        turn: a turn that has begun or is about to.
        model: model name to give in the answer.
        mark: what the response's id ends with, to tell what made it; empty for nothing.
        echoed: fields of the request that the response repeats.
        names: the client's names for the functions.
        logprobs: finds the tokens of the text; None if no log probabilities are asked for.
        seals_thoughts: whether reasoning comes as `encrypted_content` too.
        keep: stores the response; None if it is not to be stored.
    """

    def __init__(
        self,
        turn: Turn,
        *,
        model: str,
        mark: str = "",
        echoed: dict[str, Any],
        names: FunctionNames,
        logprobs: TextLogprobs | None = None,
        seals_thoughts: bool = False,
        keep: Callable[[dict[str, Any]], Awaitable[None]] | None = None,
    ) -> None:
        self._turn = turn
        self._names = names
        self._logprobs = logprobs
        self._seals_thoughts = seals_thoughts
        self._keep = keep
        self._items: list[_Item] = []
        self._sequence_number = 0
        self._response: dict[str, Any] = {
            "id": f"resp_{turn.generation_id}{mark}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": model,
            "output": [],
            "usage": None,
            **echoed,
        }

    def begin(self) -> bytes:
        """The events that announce the response."""
        created = [{"type": "response.created", "response": self._response},
                   {"type": "response.in_progress", "response": self._response}]  # fmt: skip
        return self._written(created)

    def write(self, updates: Sequence[Update]) -> bytes:
        """The events for what is new."""
        return self._written([event for update in updates for event in self._take(update)])

    async def settle(self) -> None:
        """Store the response, so that the client's next request finds it."""
        if self._keep is not None:
            await self._keep(self.response())

    def end(self) -> bytes:
        """The events that close the last item and the response."""
        last = self._close_item()
        response = self.response()
        return self._written([*last, {"type": f"response.{response['status']}", "response": response}])

    def failure(self, error: APIError) -> bytes:
        """The event that reports a failure."""
        detail = {"code": error.code or "server_error", "message": error.message}
        response = {**self._response, "status": "failed", "error": detail,
                    "output": [item.as_dict("incomplete") for item in self._items]}  # fmt: skip
        return self._written([{"type": "response.failed", "response": response}])

    def add(self, updates: Sequence[Update]) -> None:
        """Take in what is new."""
        for update in updates:
            self._take(update)

    def whole(self) -> dict[str, Any]:
        """The response object."""
        self._close_item()
        return self.response()

    @property
    def num_values(self) -> int:
        """Roughly one piece of text per token."""
        return self._turn.num_output_tokens

    def _take(self, update: Update) -> list[Event]:
        """Take in what is new, and return the events for it."""
        if self._logprobs is not None:
            self._logprobs.push(update.logprobs)
        told: list[Event] = []
        for event in update.events:
            match event:
                case TextDelta(text):
                    told += self._open_item("message") + self._items[-1].add_text(text, self._logprobs_of(text))
                case ReasoningDelta(text):
                    told += self._open_item("reasoning") + self._items[-1].add_text(text)
                    self._logprobs_of(text)
                case ToolCallStart(_, call_id, name):
                    names = self._names.find(name).fields()
                    told += self._close_item() + self._open_item("function_call", call_id=call_id, **names)
                case ToolCallArguments(_, text):
                    told += self._items[-1].add_text(text)
        return told

    def _logprobs_of(self, text: str) -> list[dict[str, Any]]:
        """Log probabilities of the tokens that begin in the next piece of text, if they are asked for."""
        return self._logprobs.pop(text) if self._logprobs is not None else []

    def _open_item(self, kind: str, **fields: str) -> list[Event]:
        """Begin an item of this kind, unless the open item is of this kind."""
        if self._items and self._items[-1].is_open and self._items[-1].kind == kind:
            return []
        told = self._close_item()
        self._items.append(_Item(kind, len(self._items), fields, seals=self._seals_thoughts))
        return told + self._items[-1].opening()

    def _close_item(self) -> list[Event]:
        return self._items[-1].closing(self._status) if self._items and self._items[-1].is_open else []

    @property
    def _status(self) -> str:
        return "incomplete" if self._turn.choices[0].finish_reason == "length" else "completed"

    def response(self) -> dict[str, Any]:
        """The response object, once the turn is complete."""
        turn = self._turn
        usage = {
            "input_tokens": turn.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": turn.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": turn.num_output_tokens,
            "output_tokens_details": {"reasoning_tokens": turn.num_reasoning_tokens},
            "total_tokens": turn.num_prompt_tokens + turn.num_output_tokens,
        }
        incomplete = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        return {**self._response, "status": self._status, "incomplete_details": incomplete,
                "output": [item.as_dict(self._status) for item in self._items], "usage": usage}  # fmt: skip

    def _written(self, events: Sequence[Event]) -> bytes:
        parts = []
        for event in events:
            event["sequence_number"] = self._sequence_number
            self._sequence_number += 1
            parts.append(b"event: " + event["type"].encode() + b"\ndata: " + encode_json(event) + b"\n\n")
        return b"".join(parts)


def response_failure(error: APIError) -> bytes:
    """The event that ends a stream if something fails before there is a response."""
    value = {"type": "error", "code": error.code, "message": error.message, "param": error.param, "sequence_number": 0}
    return b"event: error\ndata: " + encode_json(value) + b"\n\n"


_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_EVENTS = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}


class _Item:
    """One item of a response's output, with its text as it grows."""

    def __init__(self, kind: str, index: int, fields: dict[str, str], *, seals: bool) -> None:
        self.kind = kind
        self.is_open = True
        self._fields = fields
        self._seals = seals
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._id = f"{_PREFIXES[kind]}_{secrets.token_hex(12)}"
        self._place: Event = {"item_id": self._id, "output_index": index}
        if kind != "function_call":
            self._place["content_index"] = 0

    def opening(self) -> list[Event]:
        """The events that begin it."""
        added = {"type": "response.output_item.added", "output_index": self._place["output_index"],
                 "item": {**self.as_dict("in_progress"), **({"content": []} if self._has_parts else {})}}  # fmt: skip
        if not self._has_parts:
            return [added]
        return [added, {"type": "response.content_part.added", **self._place, "part": self._part("")}]

    def add_text(self, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> list[Event]:
        """Add to its text or arguments, and return the events for it."""
        self._texts.append(text)
        self._logprobs += logprobs
        return [{"type": f"{_EVENTS[self.kind]}.delta", **self._place, "delta": text, **self._told(logprobs)}]

    def closing(self, status: str) -> list[Event]:
        """The events that end it."""
        self.is_open = False
        text = "".join(self._texts)
        if self._has_parts:
            told = [{"type": f"{_EVENTS[self.kind]}.done", **self._place, "text": text, **self._told(self._logprobs)},
                    {"type": "response.content_part.done", **self._place, "part": self._part(text)}]  # fmt: skip
        else:
            done = {**self._place, "name": self._fields["name"], "arguments": text}
            told = [{"type": f"{_EVENTS[self.kind]}.done", **done}]
        index = self._place["output_index"]
        return [*told, {"type": "response.output_item.done", "output_index": index, "item": self.as_dict(status)}]

    def as_dict(self, status: str) -> dict[str, Any]:
        """The item as generated so far."""
        text = "".join(self._texts)
        item: dict[str, Any] = {"id": self._id, "type": self.kind, "status": status}
        if self.kind == "message":
            return {**item, "role": "assistant", "content": [self._part(text)]}
        if self.kind == "reasoning":
            sealed = {"encrypted_content": seal_thoughts(text)} if self._seals else {}
            return {**item, "summary": [], "content": [self._part(text)], **sealed}
        return {**item, **self._fields, "arguments": text}

    def _told(self, logprobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"logprobs": list(logprobs)} if self.kind == "message" else {}

    @property
    def _has_parts(self) -> bool:
        return self.kind != "function_call"

    def _part(self, text: str) -> dict[str, Any]:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self._logprobs)}
