"""Reads a streamed answer (server-sent events of OpenAI's API) and notes when each chunk came.

Server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html. Of its three line ends CR alone is
not understood; no server uses it.
"""

import msgspec

from deployments.bench.records import RequestRecord

_DONE = b"[DONE]"


class _Delta(msgspec.Struct, gc=False):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[msgspec.Raw] | None = None

    @property
    def is_role_only(self) -> bool:
        return self.role is not None and not self.has_text

    @property
    def has_text(self) -> bool:
        return bool(self.content or self.reasoning or self.reasoning_content or self.tool_calls)


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    @property
    def has_text(self) -> bool:
        return bool(self.text) if self.delta is None else self.delta.has_text


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Error(msgspec.Struct, gc=False):
    message: str | None = None
    type: str | None = None
    code: str | int | None = None


class _Event(msgspec.Struct, gc=False):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | str | None = None


_decode = msgspec.json.Decoder(_Event).decode


class AnswerReader:
    """Collects one answer's times.

    A chunk is an event with choices, as in vLLM's benchmark, but for two that carry no token: the opening of a chat
    that names the role alone, which some servers send before they have read the prompt, and a closing that has a
    `finish_reason` and no text, which ends the latency but makes no gap.
    """

    __slots__ = ("_error", "_finished_at", "_first_at", "_gaps_s", "_is_closed", "_last_at", "_num_chunks", "_rest",
                 "_usage", "is_done")  # fmt: skip

    def __init__(self) -> None:
        self.is_done = False
        self._rest = b""
        self._first_at: float | None = None
        self._last_at = 0.0
        self._finished_at: float | None = None
        self._gaps_s: list[float] = []
        self._num_chunks = 0
        self._usage: _Usage | None = None
        self._error: tuple[str, str] | None = None
        self._is_closed = False

    def feed(self, data: bytes, received_at: float) -> None:
        """Take bytes of the body.

        Args:
            data: any part of it.
            received_at: when it came, in seconds on the monotonic clock.
        """
        if b"\r" in data:
            data = data.replace(b"\r", b"")
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            self._take(event, received_at)

    def complete(self, record: RequestRecord) -> None:
        """Write what was seen into the record, which holds an error already where the exchange failed."""
        if self._first_at is None and self._is_closed:  # the only token had no text, as when it ends the answer
            self._first_at = self._finished_at
            self._num_chunks = 1
        if record.error_kind is None:
            record.error_kind, record.error_example = self._verdict()
        record.gaps_s = self._gaps_s
        if self._first_at is not None:
            record.ttft_s = self._first_at - record.sent_s
            record.latency_s = (self._finished_at or self._last_at) - record.sent_s
        record.num_output_tokens = self._num_chunks
        usage = self._usage
        if usage is not None and usage.completion_tokens is not None:
            record.num_output_tokens = usage.completion_tokens
            record.is_counted_by_server = True
        if usage is not None and usage.prompt_tokens is not None:
            record.num_input_tokens = usage.prompt_tokens

    def _take(self, event: bytes, received_at: float) -> None:
        for line in event.split(b"\n"):
            if not line.startswith(b"data:"):
                continue  # a comment, which keeps the connection open, or a field that OpenAI does not use
            data = line[5:].strip()
            if data == _DONE:
                self.is_done = True
                continue
            try:
                self._note(_decode(data), received_at)
            except msgspec.DecodeError as error:
                self._error = self._error or ("invalid event", f"{error}: {data[:200].decode(errors='replace')}")

    def _note(self, event: _Event, received_at: float) -> None:
        if event.error is not None:
            error = event.error if isinstance(event.error, _Error) else _Error(message=event.error)
            self._error = self._error or (f"stream error {error.code or error.type or ''}".strip(), error.message or "")
        if event.usage is not None:
            self._usage = event.usage
        if not event.choices:
            return
        choice = event.choices[0]
        if choice.finish_reason is not None:
            self._is_closed = True
            self._finished_at = received_at
        has_text = choice.has_text
        names_role_only = choice.delta is not None and choice.delta.is_role_only
        if names_role_only or (choice.finish_reason is not None and not has_text):
            return
        if self._first_at is None:
            self._first_at = received_at
        else:
            self._gaps_s.append(received_at - self._last_at)
        self._last_at = received_at
        self._num_chunks += 1

    def _verdict(self) -> tuple[str | None, str | None]:
        """Kind of error and an example; None for a whole answer."""
        if self._error is not None:
            return self._error
        if self._rest.lstrip()[:1] == b"{":
            return "not a stream", "the server answered as one JSON object; does it support stream: true?"
        if not (self.is_done or self._is_closed):
            return "stream cut", "the answer ended without finish_reason and [DONE]"
        if self._first_at is None:
            return "no tokens", "the answer ended without a chunk"
        return None, None
