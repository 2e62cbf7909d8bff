"""The form in which a chat template expects earlier calls: found by trying, since templates disagree.

Some want arguments as text where most want an object, or no content next to calls, or one call per message, or ids of
nine letters. A client's history is converted to the form that the template accepts.
"""

import hashlib
import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deployments.chat.tool_formats.mistral import ID_LENGTH
from deployments.model_config import ToolParserName
from llm.errors import InvalidRequestError
from llm.tokenization.hf_tokenizer import HFTokenizer

_TEXT = "text"
_LETTERS = string.ascii_letters + string.digits
_SHORT_ID = re.compile(rf"[a-zA-Z0-9]{{{ID_LENGTH}}}")


@dataclass(frozen=True, slots=True)
class HistoryStyle:
    """What a template wants.

    Attributes:
        is_content_null: if a message has calls and no text, its content is null, not empty.
        has_text_arguments: arguments are JSON text, not an object.
        has_single_calls: a message holds one call.
        has_short_ids: ids of calls are nine letters or digits.
        has_calls_alone: a message with calls has no text; the text goes into a separate message before it.
        has_channels: a message with calls never has both thoughts and content, and every tool has a description, as in
            gpt-oss's template.
    """

    is_content_null: bool = False
    has_text_arguments: bool = False
    has_single_calls: bool = False
    has_short_ids: bool = False
    has_channels: bool = False
    has_calls_alone: bool = False

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages of a chat in this style."""
        told = _text_before_calls(messages) if self.has_calls_alone else messages
        adapted = [self._message(message) for message in told]
        return _one_call_each(adapted) if self.has_single_calls else adapted

    def tools(self, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Tools in this style."""
        if not self.has_channels:
            return [dict(tool) for tool in tools]
        return [{**tool, "function": {"description": "", **tool["function"]}} for tool in tools]

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        adapted = dict(message)
        if adapted.get("tool_calls"):
            adapted["tool_calls"] = [self._call(call) for call in adapted["tool_calls"]]
            if self.is_content_null and not adapted.get("content"):
                adapted["content"] = None
        if self.has_short_ids and adapted.get("tool_call_id"):
            adapted["tool_call_id"] = _short_id(adapted["tool_call_id"])
        thoughts = adapted.get("reasoning_content")
        if thoughts and not (self.has_channels and adapted.get("tool_calls") and adapted.get("content")):
            adapted["thinking"] = thoughts  # the name that some templates know, as in transformers
        return adapted

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        adapted = dict(call)
        if self.has_short_ids:
            adapted["id"] = _short_id(adapted["id"])
        arguments = adapted["function"]["arguments"]
        if self.has_text_arguments and not isinstance(arguments, str):
            text = json.dumps(arguments, ensure_ascii=False)
            adapted["function"] = {**adapted["function"], "arguments": text}
        return adapted


def find_style(tokenizer: HFTokenizer, tool_parser: ToolParserName | None) -> HistoryStyle:
    """The style in which a checkpoint's template shows the arguments of earlier calls; the usual style if none does."""
    has_short_ids = tool_parser is ToolParserName.MISTRAL
    has_channels = tool_parser is ToolParserName.HARMONY
    for is_content_null, has_text_arguments in ((False, False), (True, False), (True, True), (False, True)):
        style = HistoryStyle(is_content_null, has_text_arguments, False, has_short_ids, has_channels)
        if _shows(tokenizer, style, 1):
            style = replace(style, has_single_calls=not _shows(tokenizer, style, 2))
            alone = replace(style, has_calls_alone=True)
            is_alone = not _shows(tokenizer, style, 1, _TEXT) and _shows(tokenizer, alone, 1, _TEXT)
            return alone if is_alone else style
    return HistoryStyle(has_short_ids=has_short_ids, has_channels=has_channels)


def _shows(tokenizer: HFTokenizer, style: HistoryStyle, num_calls: int, content: str = "") -> bool:
    """Whether this many calls in one message, along with this text, all appear in the template's output."""
    values = [f"value{i}" for i in range(num_calls)]
    ids = [f"abcdefgh{i}" for i in range(num_calls)]
    function = {"name": "probe", "description": "", "parameters": {"type": "object", "properties": {}}}
    calls = [
        {"id": call_id, "type": "function", "function": {"name": "probe", "arguments": {"key": value}}}
        for call_id, value in zip(ids, values, strict=True)
    ]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": content, "tool_calls": calls},
        *({"role": "tool", "tool_call_id": call_id, "name": "probe", "content": "result"} for call_id in ids),
    ]
    tools = [{"type": "function", "function": function}]
    try:
        text = tokenizer.render_chat(style.messages(messages), tools=tools).text
    except InvalidRequestError:
        return False
    return all(value in text for value in values)


def _text_before_calls(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Split messages with text and calls into two messages."""
    split: list[Mapping[str, Any]] = []
    for message in messages:
        if message.get("tool_calls") and message.get("content"):
            split.append({key: value for key, value in message.items() if key != "tool_calls"})
            message = {"role": message["role"], "content": "", "tool_calls": message["tool_calls"]}
        split.append(message)
    return split


def _one_call_each(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split messages with several calls into several messages, each followed by its result."""
    results = {message["tool_call_id"]: message for message in messages if message.get("tool_call_id")}
    placed: set[str] = set()
    split: list[dict[str, Any]] = []
    for message in messages:
        calls = message.get("tool_calls") or ()
        if message.get("tool_call_id") in placed:
            continue
        if len(calls) < 2:
            split.append(message)
            continue
        for i, call in enumerate(calls):
            rest = {"role": message["role"], "content": None if message.get("content") is None else ""}
            split.append({**(message if i == 0 else rest), "tool_calls": [call]})
            if call["id"] in results and call["id"] not in placed:
                placed.add(call["id"])
                split.append(results[call["id"]])
    return split


def _short_id(call_id: str) -> str:
    """The id itself if it is short enough; otherwise nine letters derived from it, always the same."""
    if _SHORT_ID.fullmatch(call_id):
        return call_id
    digest = hashlib.sha256(call_id.encode(errors="surrogatepass")).digest()
    return "".join(_LETTERS[byte % len(_LETTERS)] for byte in digest[:ID_LENGTH])
