"""Conversations in which a text holds half a character.

Clients cut long texts, such as the results of tools, after so many UTF-16 units, and so between the halves of a
surrogate pair (an emoji, for example). JSON can hold such a half as an escape; no text that a tokenizer takes can. If
the request were refused, the conversation could never continue, since each later request holds the same text.
"""

import json
import re
from typing import Any

_HALF = re.compile("[\ud800-\udfff]")
_ESCAPED_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
_SPOKEN = ("messages", "input", "instructions", "system", "prompt", "query", "documents")
"""Fields that hold what was said. In others, such as schemas, a half is an error like any other."""


def with_whole_characters(data: bytes) -> Any:
    """The value of a body in whose conversation the replacement character U+FFFD stands for each half of a character.

    Args:
        data: JSON that could not be parsed.

    Returns:
        The value; None if something else is wrong, too.
    """
    if not _ESCAPED_HALF.search(data):
        return None
    try:
        value = json.loads(data)
        if not isinstance(value, dict):
            return None
        whole = {name: _mended(item) if name in _SPOKEN else item for name, item in value.items()}
        json.dumps(whole, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # UnicodeEncodeError is a ValueError
        return None
    return whole


def _mended(value: Any) -> Any:
    """The value with the replacement character for each half in its texts.

    Raises:
        RecursionError: it is nested too deep.
    """
    if isinstance(value, str):
        return _HALF.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_mended(key): _mended(item) for key, item in value.items()}
    return [_mended(item) for item in value] if isinstance(value, list) else value
