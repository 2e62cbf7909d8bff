"""The assistant's message in the form of chat completions, whole or in deltas."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from deployments.chat.output import OutputEvent, ReasoningDelta, TextDelta, ToolCallArguments, ToolCallStart


@dataclass(slots=True)
class Call:
    """One tool call."""

    call_id: str
    name: str
    arguments: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The call in the form of chat completions."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


@dataclass(slots=True)
class Message:
    """What the assistant has said so far."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def add(self, events: Sequence[OutputEvent]) -> None:
        """Take in what is new."""
        for event in events:
            match event:
                case TextDelta(text):
                    self.texts.append(text)
                case ReasoningDelta(text):
                    self.thoughts.append(text)
                case ToolCallStart(_, call_id, name):
                    self.calls.append(Call(call_id, name))
                case ToolCallArguments(index, text):
                    self.calls[index].arguments += text

    @property
    def content(self) -> str:
        """The text."""
        return "".join(self.texts)

    @property
    def reasoning(self) -> str:
        """The thoughts."""
        return "".join(self.thoughts)

    def as_dict(self) -> dict[str, Any]:
        """The message in the form of chat completions: calls and reasoning only if there are any, no empty text beside
        calls."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content, "refusal": None}
        if self.calls:
            message["content"] = self.content or None
            message["tool_calls"] = [call.as_dict() for call in self.calls]
        if self.thoughts:
            message["reasoning_content"] = self.reasoning
        return message


def delta_of(event: OutputEvent) -> dict[str, Any]:
    """An event as the `delta` of a streamed chat."""
    match event:
        case TextDelta(text):
            return {"content": text}
        case ReasoningDelta(text):
            return {"reasoning_content": text}
        case ToolCallStart(index, call_id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
        case ToolCallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
