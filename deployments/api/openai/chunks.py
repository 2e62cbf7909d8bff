"""Chunks of streamed completions, put together from strings made once per choice.

For each token, only the new text itself is validated or serialized.
"""

from typing import Any

from deployments.api.sse import encode_json


class ChunkWriter:
    """Writes the events of one streamed choice; everything that stays the same is made once.

    Args:
        head: the chunk's fields before `choices`.
        index: index of the choice.
        is_chat: chat chunks carry `delta`, completion chunks `text`.
        with_usage: every chunk but the last says `"usage": null`.
    """

    def __init__(self, head: dict[str, Any], index: int, *, is_chat: bool, with_usage: bool) -> None:
        start = b"data: " + encode_json(head)[:-1] + b',"choices":[{"index":%d,' % index
        self._open_delta = start + b'"delta":'
        self._open_text = start + (b'"delta":{"content":' if is_chat else b'"text":')
        self._close_text = (b"}" if is_chat else b"") + b',"logprobs":'
        self._open_empty = start + (b'"delta":{}' if is_chat else b'"text":""') + b',"logprobs":null,"finish_reason":'
        self._open_role = start + b'"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null'
        self._tail = b"}]" + (b',"usage":null' if with_usage else b"") + b"}\n\n"
        self._plain_tail = self._close_text + b'null,"finish_reason":null' + self._tail

    def role(self) -> bytes:
        """The first chunk of a chat choice."""
        return self._open_role + b',"finish_reason":null' + self._tail

    def text(self, text: str, logprobs: dict[str, Any] | None = None) -> bytes:
        """A chunk of new text."""
        if logprobs is None:
            return self._open_text + encode_json(text) + self._plain_tail
        return (
            self._open_text + encode_json(text) + self._close_text + encode_json(logprobs)
            + b',"finish_reason":null' + self._tail
        )  # fmt: skip

    def delta(self, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> bytes:
        """A chunk for anything else that is new in a chat choice."""
        return (
            self._open_delta + encode_json(delta) + b',"logprobs":' + encode_json(logprobs)
            + b',"finish_reason":null' + self._tail
        )  # fmt: skip

    def finish(self, reason: str) -> bytes:
        """The last chunk of a choice."""
        return self._open_empty + encode_json(reason) + self._tail
