"""Tool calls in a model's text, in the formats that chat templates teach.

Hermes and Qwen write `<tool_call>{"name": …, "arguments": {…}}</tool_call>`; Llama 3 writes `{"name": …, "parameters":
{…}}` instead of content.
"""

import json
import re
import secrets

from deployments.chat.output import OutputEvent, TextDelta, ToolCallArguments, ToolCallStart, num_held


class HermesToolParser:
    """Calls between `<tool_call>` and `</tool_call>`; the rest is content."""

    _OPEN, _CLOSE = "<tool_call>", "</tool_call>"

    def __init__(self) -> None:
        self._buffer = ""
        self._num_calls = 0
        self._call: _Call | None = None
        self._is_blank = True
        """Nothing but white space has come since the beginning, or since the last call."""

    def push(self, text: str) -> list[OutputEvent]:
        """See `OutputParser`."""
        self._buffer += text
        events: list[OutputEvent] = []
        while self._reach_call(events) and self._pass_call(events):
            pass
        return events

    def finish(self) -> list[OutputEvent]:
        """See `OutputParser`."""
        if self._call is None:
            text = self._buffer
            return [TextDelta(text)] if text.strip() or (text and not self._num_calls) else []
        if self._call.is_begun:
            return []
        return [TextDelta(self._OPEN + self._call.text + self._buffer)]

    def _reach_call(self, events: list[OutputEvent]) -> bool:
        """Give what is content before the next call; whether there is one."""
        if self._call is not None:
            return True
        start = self._buffer.find(self._OPEN)
        end = start if start >= 0 else len(self._buffer) - num_held(self._buffer, self._OPEN)
        text = self._buffer[:end]
        if text and not (self._is_blank and text.isspace()):
            events.append(TextDelta(text.lstrip() if self._is_blank and self._num_calls else text))
            self._is_blank = False
            self._buffer = self._buffer[end:]
        if start < 0:
            return False
        self._buffer = self._buffer[self._buffer.index(self._OPEN) + len(self._OPEN) :]
        self._call = _Call(self._num_calls)
        return True

    def _pass_call(self, events: list[OutputEvent]) -> bool:
        """Take the call's text; whether it is over."""
        call = self._call
        assert call is not None, "reached"
        if call.is_open:
            self._buffer = call.push(self._buffer, events)
            if call.is_open:
                return False
        if not call.is_begun:
            raw = call.text + self._buffer
            end = raw.find(self._CLOSE)
            if end < 0:
                return False
            end += len(self._CLOSE)
            events.append(TextDelta(self._OPEN + raw[:end]))
            self._buffer, self._call, self._is_blank = raw[end:], None, False
            return True
        tail = self._buffer.lstrip()
        if self._CLOSE.startswith(tail) and tail != self._CLOSE:
            return False  # the closing tag is still on its way
        self._buffer = tail.removeprefix(self._CLOSE)
        self._num_calls += 1
        self._call, self._is_blank = None, True
        return True


class JsonToolParser:
    """Calls written as bare JSON objects, alone, one after the other or in a list; an answer without them is content.

    This is Llama 3's format, and that of calls which are forced.
    """

    _BETWEEN = " \t\r\n;,[]"
    _TAG = "<|python_tag|>"

    def __init__(self) -> None:
        self._held = ""
        self._num_calls = 0
        self._call: _Call | None = None
        self._is_text = False

    def push(self, text: str) -> list[OutputEvent]:
        """See `OutputParser`."""
        events: list[OutputEvent] = []
        while text and not self._is_text:
            if self._call is None:
                self._held += text
                text = self._held.lstrip(self._BETWEEN)
                if not self._num_calls and not self._held.strip().startswith("["):
                    text = text.removeprefix(self._TAG).lstrip()
                    if self._TAG.startswith(text):
                        return events
                if not text:
                    return events
                if not text.startswith("{"):
                    text, self._held, self._is_text = self._held, "", True
                    break
                self._held = self._held[: len(self._held) - len(text)]
                self._call = _Call(self._num_calls)
            text = self._call.push(text, events)
            if self._call.is_open:
                break
            if not self._call.is_begun:
                text = self._held + self._call.text + text
                self._is_text = True
            self._num_calls += self._call.is_begun
            self._call, self._held = None, ""
        if self._is_text and text:
            events.append(TextDelta(text))
        return events

    def finish(self) -> list[OutputEvent]:
        """See `OutputParser`."""
        if self._call is not None and not self._call.is_begun:
            return [TextDelta(self._held + self._call.text)]
        return [TextDelta(self._held)] if self._call is None and self._held and not self._num_calls else []


class _Call:
    """Follows one JSON object that may be a call, as it is written.

    Attributes:
        text: what has been taken.
        is_open: the object is not whole yet, nor certain not to be one.
        is_begun: it is a call; its start has been given.
    """

    _HEAD = re.compile(
        r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*'
        r"(?=\{)"
    )

    def __init__(self, index: int) -> None:
        self.text = ""
        self.is_open = True
        self.is_begun = False
        self._index = index
        self._whole = _Nesting()
        self._arguments = _Nesting()
        self._has_arguments = False

    def push(self, text: str, events: list[OutputEvent]) -> str:
        """Take more text, up to the object's end; returns what is behind it."""
        end = self._whole.find_end(text)
        if end < 0 and not self._whole.is_broken:
            self.text += text
            self._follow(text, events)
            return ""
        if self._whole.is_broken:
            self.text += text
            self.is_open = False
            return ""
        self.text += text[:end]
        self._follow(text[:end], events)
        self.is_open = False
        if not self.is_begun:
            self._read_whole(events)
        return text[end:]

    def _follow(self, text: str, events: list[OutputEvent]) -> None:
        """Give the call's start once it is there, and its arguments as they come."""
        if not self.is_begun:
            head = self._HEAD.match(self.text)
            if head is None:
                return
            self.is_begun = True
            events.append(ToolCallStart(self._index, _new_call_id(), json.loads(head[1], strict=False)))
            text = self.text[head.end() :]
        if self._has_arguments:
            return
        end = self._arguments.find_end(text)
        self._has_arguments = end >= 0
        piece = text[:end] if end >= 0 else text
        if piece:
            events.append(ToolCallArguments(self._index, piece))

    def _read_whole(self, events: list[OutputEvent]) -> None:
        """A call written in another order."""
        try:
            value = json.loads(self.text)
        except ValueError:
            return
        arguments = value.get("arguments", value.get("parameters"))
        if isinstance(value.get("name"), str) and isinstance(arguments, dict):
            self.is_begun = True
            events.append(ToolCallStart(self._index, _new_call_id(), value["name"]))
            events.append(ToolCallArguments(self._index, json.dumps(arguments, ensure_ascii=False)))


class _Nesting:
    """Finds the end of a JSON object in text that comes in pieces.

    Attributes:
        is_broken: the text does not begin with an object.
    """

    def __init__(self) -> None:
        self.is_broken = False
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def find_end(self, text: str) -> int:
        """The place behind the object's last brace, -1 while it has not come."""
        for place, char in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = char == "\\"
                self._in_string = char != '"'
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place + 1
            elif not self._depth:
                if not char.isspace():
                    self.is_broken = True
                    return -1
            elif char == '"':
                self._in_string = True
        return -1


def _new_call_id() -> str:
    return "call_" + secrets.token_hex(12)
