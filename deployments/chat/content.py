"""Message contents as sent over the wire: strings, or lists of parts whose text is taken."""

import json
from typing import Any

from pydantic import ValidationInfo

from deployments.chat.wire_model import is_strict, note_ignored

WRITTEN_BY_MODELS = frozenset({"assistant", "tool", "function"})
"""Roles whose messages are passed on as far as possible and never refused: the client only repeats them."""
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of parts that hold text, and the field that holds it."""
_THOUGHTS = frozenset({"thinking", "redacted_thinking", "reasoning"})


def text_of(value: Any, info: ValidationInfo) -> Any:
    """The text of a message's content: a string, or the texts of its parts, joined by line breaks.

    Any other value in a tool's result, such as an object, becomes its JSON. An image there becomes the text `[image]`,
    and likewise for other parts without text; what the assistant once wrote in an unknown form is left out.

    Raises:
        ValueError: it is neither, or a part of a user's message is not text.
    """
    if value is None or isinstance(value, str):
        return value
    role = info.data.get("role")
    if not isinstance(value, list):
        if role in WRITTEN_BY_MODELS:
            return json.dumps(value, ensure_ascii=False)
        raise ValueError("must be a string or a list of text parts")
    texts = [_part_text(part, role, info) for part in value if part is not None]
    return "\n".join(text for text in texts if text is not None)


def _part_text(part: Any, role: str | None, info: ValidationInfo) -> str | None:
    """The text of a part; None if it is left out."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise ValueError("each part must be an object")
    kind = part.get("type") or "text"
    field = _TEXTS.get(kind) if isinstance(kind, str) else None
    text = part.get(field) if field is not None else None
    if isinstance(text, str):
        if len(part) > 2:
            _note_rest(part, field, info)
        return text
    if role not in WRITTEN_BY_MODELS:
        if field is not None:
            raise ValueError(f"a part of the type {kind} needs a {field}, a string")
        raise ValueError(f"this model takes text only, not {kind[:40]!r}" if isinstance(kind, str) else "no type")
    if role == "assistant" or field is not None or not isinstance(kind, str) or kind in _THOUGHTS:
        note_ignored(info, "part", part, "type")
        return None
    return placeholder(kind)


def placeholder(kind: str) -> str:
    """What a model is shown in place of something that has no text, such as `[image]` for an image."""
    return f"[{kind[:40].removeprefix('input_').removesuffix('_url')}]"


def failed(text: str) -> str:
    """What a model is shown as the result of a tool that failed: chat templates have no other way to say so."""
    mark = placeholder("error")
    return f"{mark}\n{text}" if text else mark


def _note_rest(part: dict[str, Any], field: str | None, info: ValidationInfo) -> None:
    for name in part:
        if name not in ("type", field) and part[name] is not None:
            if is_strict(info):
                raise ValueError(f"unknown field {name[:80]!r} in a part")
            note_ignored(info, "part", part, name)
