"""Items of OpenAI's Responses API: what they hold, and the chat turns that they stand for.

After https://platform.openai.com/docs/api-reference/responses/create#responses-create-input. Items are history: what a
model once wrote is never refused, however odd. Items of unknown kinds are passed to the model as calls and results if
that is what they are, and left out otherwise.
"""

import base64
import binascii
import json
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, PlainValidator, Tag, ValidationInfo

from deployments.api.openai.response_tools import FunctionId
from deployments.chat.content import failed, placeholder, text_of
from deployments.chat.errors import invalid
from deployments.chat.skipped import Skipped, skip
from deployments.chat.structured import NonEmpty
from deployments.chat.wire_model import NoEffect, WireModel, type_tag

_THOUGHTS_MARK = "rayline-1:"
"""Prefix of the encrypted contents that this server makes."""


class MessageItem(WireModel):
    """A message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str | None, BeforeValidator(text_of, json_schema_input_type=str | list[dict[str, Any]] | None)
    ] = None
    id: Any = None
    status: NoEffect = None
    phase: NoEffect = None


def _as_text(value: Any) -> str:
    """A text, or the JSON of a value that is not a text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class FunctionCallItem(WireModel):
    """A function call that the model made."""

    type: Literal["function_call"]
    call_id: str = ""
    name: str = ""
    arguments: Annotated[str, PlainValidator(_as_text, json_schema_input_type=str)] = ""
    id: Any = None
    status: NoEffect = None
    namespace: str | None = None


def _output_text(value: Any) -> str:
    """The result of a call, as text; a part that is not text is named in its place."""
    return "\n".join(_part_text(part) for part in value) if isinstance(value, list) else _as_text(value)


def _part_text(part: Any) -> str:
    if not isinstance(part, dict):
        return _as_text(part)
    text, kind = part.get("text"), part.get("type")
    if isinstance(text, str):
        return text
    if isinstance(kind, str):
        return placeholder(kind)
    return json.dumps(part, ensure_ascii=False)


class FunctionOutputItem(WireModel):
    """The result of a call: a text, or parts; for parts that are not text only the kind is given."""

    type: Literal["function_call_output"]
    call_id: str = ""
    output: Annotated[str, PlainValidator(_output_text, json_schema_input_type=str | list[dict[str, Any]])] = ""
    id: Any = None
    status: NoEffect = None


class ReasoningItem(WireModel):
    """What the model thought before its next item."""

    type: Literal["reasoning"]
    summary: Any = None
    content: Any = None
    encrypted_content: Any = None
    """In this server's responses: the thoughts, for clients that send nothing else back."""
    id: Any = None
    status: NoEffect = None

    @property
    def text(self) -> str:
        """The thoughts, or what is left of them."""
        return _texts(self.content) or open_thoughts(self.encrypted_content) or _texts(self.summary)


class ItemReference(WireModel):
    """A reference to a stored item."""

    type: Literal["item_reference"] = "item_reference"
    id: NonEmpty


_SUMMARY = "compaction_trigger"
"""Type of an item that asks for a summary in place of an answer."""


def _other_item(value: Any, info: ValidationInfo) -> Skipped:
    if isinstance(value, dict) and value.get("type") == _SUMMARY:
        raise invalid(f"type: {_SUMMARY} is not supported by this server; leave the item out", "input")
    return Skipped(value) if isinstance(value, dict) and _exchange_kind(value) else skip(value, info)


_KNOWN = ("message", "function_call", "function_call_output", "reasoning", "item_reference")


def _item_tag(value: Any) -> str:
    if isinstance(value, Skipped):
        return "[other]"
    tag = type_tag(value, default="message")
    if tag in ("[message]", "[item_reference]") and isinstance(value, dict) and "role" not in value and "id" in value:
        return "[item_reference]"
    return tag if tag[1:-1] in _KNOWN else "[other]"


InputItem = Annotated[
    Annotated[MessageItem, Tag("[message]")]
    | Annotated[FunctionCallItem, Tag("[function_call]")]
    | Annotated[FunctionOutputItem, Tag("[function_call_output]")]
    | Annotated[ReasoningItem, Tag("[reasoning]")]
    | Annotated[ItemReference, Tag("[item_reference]")]
    | Annotated[Skipped, PlainValidator(_other_item, json_schema_input_type=dict[str, Any]), Tag("[other]")],
    Discriminator(_item_tag),
]


def seal_thoughts(text: str) -> str:
    """The thoughts as `encrypted_content`. They are not secret from the client, which gets them as `content` too."""
    return _THOUGHTS_MARK + base64.b64encode(text.encode(errors="surrogatepass")).decode()


def open_thoughts(sealed: Any) -> str:
    """The thoughts that `seal_thoughts` was given; empty for content that another server made."""
    if not isinstance(sealed, str) or not sealed.startswith(_THOUGHTS_MARK):
        return ""
    try:
        return base64.b64decode(sealed[len(_THOUGHTS_MARK) :], validate=True).decode(errors="replace")
    except (binascii.Error, ValueError):
        return ""


def chat_turns(items: Sequence[Any]) -> list[dict[str, Any]]:
    """The turns of a chat: consecutive thoughts, text and calls form one turn of the assistant.

    Thoughts that are not followed by text or a call of the assistant are left out.
    """
    turns: list[dict[str, Any]] = []
    thoughts: list[str] = []
    call_ids: dict[str, str] = {}
    for item in items:
        match item:
            case ReasoningItem():
                thoughts += [item.text] if item.text else []
                continue
            case MessageItem(role="assistant"):
                _assistant_turn(turns, thoughts, without="content")["content"] = item.content or ""
            case MessageItem():
                turns.append({"role": item.role, "content": item.content or ""})
            case FunctionCallItem():
                name = FunctionId(item.name, item.namespace).chat_name
                _add_call(turns, thoughts, item.call_id, name, item.arguments)
            case FunctionOutputItem():
                turns.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
            case Skipped(value):
                _add_exchange(turns, thoughts, value, call_ids)
        thoughts = []
    return turns


def _assistant_turn(turns: list[dict[str, Any]], thoughts: list[str], without: str | None = None) -> dict[str, Any]:
    """The assistant's open turn, or a new one if none is open, or if it already has calls or the field `without`."""
    if not turns or turns[-1]["role"] != "assistant" or without in turns[-1] or (without and "tool_calls" in turns[-1]):
        turns.append({"role": "assistant"})
    turn = turns[-1]
    if thoughts:
        before = [turn["reasoning_content"]] if "reasoning_content" in turn else []
        turn["reasoning_content"] = "\n".join([*before, *thoughts])
    return turn


def _add_call(turns: list[dict[str, Any]], thoughts: list[str], call_id: str, name: str, arguments: str) -> None:
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    _assistant_turn(turns, thoughts).setdefault("tool_calls", []).append(call)


def _exchange_kind(value: dict[str, Any]) -> Literal["call", "output"] | None:
    """Whether an item of an unknown kind is a call, or the result of one."""
    kind, call_id = value.get("type"), _call_id(value)
    if not isinstance(kind, str) or not isinstance(call_id, str) or not call_id:
        return None
    return "output" if kind.endswith("_output") else "call" if kind.endswith("_call") else None


def _call_id(value: dict[str, Any]) -> Any:
    """The id of the call that an item of an unknown kind makes or answers. One kind, unlike all others, names the call
    that it answers by its own `id`."""
    is_shell = value.get("type") == "local_shell_call_output"
    return value.get("call_id") or (value.get("id") if is_shell else None)


_NO_ARGUMENTS = ("type", "id", "status", "call_id", "name")


def _add_exchange(
    turns: list[dict[str, Any]], thoughts: list[str], value: dict[str, Any], call_ids: dict[str, str]
) -> None:
    """Add a call of a custom tool, a shell or the like, or its result, as if it were a function's.

    Args:
        turns: the turns so far.
        thoughts: what the model thought before the item.
        value: the item.
        call_ids: maps ids of earlier items to the ids of their calls.
    """
    kind, call_id = _exchange_kind(value), _call_id(value)
    if kind is None:
        return
    rest = {key: item for key, item in value.items() if key not in _NO_ARGUMENTS}
    if kind == "call":
        name = value.get("name") or value["type"].removesuffix("_call")
        _add_call(turns, thoughts, call_id, str(name), json.dumps(rest, ensure_ascii=False))
        if isinstance(value.get("id"), str):
            call_ids[value["id"]] = call_id
    else:
        status = value.get("status")
        content = _output_text(rest.get("output", rest or (status if status == "completed" else "")))
        content = failed(content) if status == "failed" else content
        turns.append({"role": "tool", "tool_call_id": call_ids.get(call_id, call_id), "content": content})


def _texts(parts: Any) -> str:
    """The texts of parts; empty if there are none."""
    if isinstance(parts, str):
        return parts
    texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return "\n".join(text for text in texts if isinstance(text, str))


_PREFIXES = {
    MessageItem: "msg",
    FunctionCallItem: "fc",
    FunctionOutputItem: "fco",
    ReasoningItem: "rs",
    Skipped: "item",
}


def stored_item(item: Any) -> dict[str, Any]:
    """An input item as stored and listed: with an id, and its content in parts."""
    given = item.value.get("id") if isinstance(item, Skipped) else item.id
    item_id = given if isinstance(given, str) and given else f"{_PREFIXES[type(item)]}_{secrets.token_hex(12)}"
    match item:
        case MessageItem():
            part: dict[str, Any] = {"type": "input_text", "text": item.content or ""}
            if item.role == "assistant":
                part |= {"type": "output_text", "annotations": [], "logprobs": []}
            return {"id": item_id, "type": "message", "role": item.role, "status": "completed", "content": [part]}
        case FunctionCallItem():
            names = FunctionId(item.name, item.namespace).fields()
            return {"id": item_id, "type": "function_call", "status": "completed", "call_id": item.call_id,
                    "arguments": item.arguments, **names}  # fmt: skip
        case FunctionOutputItem():
            return {"id": item_id, "type": "function_call_output", "status": "completed", "call_id": item.call_id,
                    "output": item.output}  # fmt: skip
        case ReasoningItem():
            content = [{"type": "reasoning_text", "text": item.text}] if item.text else []
            return {"id": item_id, "type": "reasoning", "summary": [], "content": content}
    return {**item.value, "id": item_id}
