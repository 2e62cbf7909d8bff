"""Text that comes in pieces, and coroutines that read it as if it were all there.

A reader asks for what comes next and is suspended until that is certain, so the way the text is cut does not matter.
"""

import secrets
import string
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from deployments.chat.output import OutputEvent, ReasoningDelta, TextDelta, ToolCallArguments, ToolCallStart, num_held

T = TypeVar("T")

Reading = Generator[None, None, T]
"""A coroutine that yields where it needs more text, and returns what it has read."""

_LETTERS = string.ascii_letters + string.digits


class Source:
    """Text to read, and the events that reading it produces.

    Args:
        id_length: number of letters and digits in a call's id; None for OpenAI's form.

    Attributes:
        is_over: no more text will come.
        num_calls: calls begun so far.
    """

    def __init__(self, id_length: int | None = None) -> None:
        self.is_over = False
        self.num_calls = 0
        self._text = ""
        self._place = 0
        self._mark: int | None = None
        self._events: list[OutputEvent] = []
        self._id_length = id_length
        self._call_ids: set[str] = set()
        self._blank: str | None = ""
        """White space that came before any content, held until content follows; None after that."""

    @property
    def rest(self) -> str:
        """Text that has arrived and has not been read."""
        return self._text[self._place :]

    def feed(self, text: str) -> None:
        """Add text at the end."""
        kept = self._place if self._mark is None else self._mark
        self._text = self._text[kept:] + text
        self._place -= kept
        self._mark = None if self._mark is None else 0

    def take_events(self) -> list[OutputEvent]:
        """Events since the last call."""
        events, self._events = self._events, []
        return events

    def mark(self) -> None:
        """Remember this place, for `rewind`."""
        self._mark = self._place

    def unmark(self) -> None:
        """Forget the place."""
        self._mark = None

    def rewind(self, tag: str = "") -> None:
        """Go back to the place remembered last, and forget it. After a call, text that the end cuts off is dropped.

        Args:
            tag: the text before that place that has turned out to be content.
        """
        assert self._mark is not None, "a place is remembered"
        is_cut = self.is_over and self.num_calls > 0
        self._place, self._mark = len(self._text) if is_cut else self._mark, None
        if tag and not is_cut:
            self.content(tag)

    def skip(self, num_chars: int) -> str:
        """Consume text that has arrived."""
        start, self._place = self._place, min(self._place + num_chars, len(self._text))
        return self._text[start : self._place]

    def back(self, num_chars: int) -> None:
        """Go back over what has just been consumed."""
        self._place -= num_chars

    def content(self, text: str) -> None:
        """Emit content. White space by itself does not count before or after a call."""
        if self._blank is not None:
            if not text.strip():
                self._blank += text
                return
            text = text.lstrip() if self.num_calls else self._blank + text
            self._blank = None
        if text:
            self._events.append(TextDelta(text))

    def reasoning(self, text: str) -> None:
        """Emit thoughts."""
        if text:
            self._events.append(ReasoningDelta(text))

    def start_call(self, name: str, call_id: str | None = None) -> None:
        """Emit the start of a call. It cannot be undone.

        Args:
            call_id: the model's id for it; a new one is made if it is None or already used.
        """
        if call_id is None or call_id in self._call_ids:
            call_id = self._new_id()
        self._call_ids.add(call_id)
        self._events.append(ToolCallStart(self.num_calls, call_id, name))
        self.num_calls += 1
        self._blank = ""
        self._mark = None

    def arguments(self, text: str) -> None:
        """Emit more of the last call's arguments."""
        if text:
            self._events.append(ToolCallArguments(self.num_calls - 1, text))

    def has(self, num_chars: int) -> Reading[bool]:
        """Whether there are this many characters to read."""
        while len(self._text) - self._place < num_chars and not self.is_over:
            yield
        return len(self._text) - self._place >= num_chars

    def peek(self) -> Reading[str]:
        """The next character; empty at the end."""
        yield from self.has(1)
        return self._text[self._place : self._place + 1]

    def skip_space(self, chars: str = " \t\r\n") -> Reading[str]:
        """Consume white space, or any run of `chars`; return the character after it, empty at the end."""
        while True:
            char = yield from self.peek()
            if not char or char not in chars:
                return char
            rest = self.rest
            self.skip(len(rest) - len(rest.lstrip(chars)))

    def passes(self, *literals: str) -> Reading[str]:
        """Consume the one of `literals` that comes next; return it, or an empty string if none does.

        None of them may begin with another. After a call, a literal that is cut off is consumed as well.
        """
        while True:
            rest = self.rest
            for literal in literals:
                if rest.startswith(literal):
                    self.skip(len(literal))
                    return literal
            if not any(literal.startswith(rest) for literal in literals):
                return ""
            if self.is_over:
                self.skip(len(rest) if self.num_calls else 0)
                return ""
            yield

    def until(self, tags: Sequence[str], take: Callable[[str], None], *, keeps_cut: bool = True) -> Reading[str]:
        """Pass text to `take`, piece by piece, up to the first of `tags`; consume and return the tag, empty at the end.

        If one tag contains another, both must end at the same place.

        Args:
            keeps_cut: a tag that the end cuts off counts as text too, unless it comes right after a call.
        """
        beginnings = {tag[0] for tag in tags}
        while True:
            rest = self.rest
            if beginnings.isdisjoint(rest):
                take(self.skip(len(rest)))
                if self.is_over:
                    return ""
                yield
                continue
            found = min(((rest.find(tag), tag) for tag in tags if tag in rest), default=None)
            if found is not None:
                take(self.skip(found[0]))
                return self.skip(len(found[1]))
            is_behind_call = self.num_calls > 0 and self._blank is not None
            is_all_text = self.is_over and keeps_cut and not is_behind_call
            num_kept = 0 if is_all_text else max(num_held(rest, tag) for tag in tags)
            take(self.skip(len(rest) - num_kept))
            if self.is_over:
                self.skip(num_kept)
                return ""
            yield

    def text_until(self, tags: Sequence[str]) -> Reading[tuple[str, str]]:
        """The text up to the first of `tags`, and that tag, which is consumed; the tag is empty at the end."""
        parts: list[str] = []
        tag = yield from self.until(tags, parts.append)
        return "".join(parts), tag

    def to_the_end(self) -> Reading[None]:
        """Emit everything that follows as content."""
        self.unmark()
        while True:
            self.content(self.skip(len(self._text)))
            if self.is_over:
                return
            yield

    def close(self) -> None:
        """Emit white space that was all of the content."""
        if self._blank and not self.num_calls:
            self._events.append(TextDelta(self._blank))

    def _new_id(self) -> str:
        if self._id_length is None:
            return "call_" + secrets.token_hex(12)
        return "".join(secrets.choice(_LETTERS) for _ in range(self._id_length))


class SourceParser:
    """An `OutputParser` made from a coroutine that reads the whole text.

    Args:
        read: reads `source`; whatever it leaves unread is content.
    """

    def __init__(self, source: Source, read: Callable[[Source], Reading[None]]) -> None:
        self._source = source
        self._reading = self._read_all(read)
        next(self._reading)

    def push(self, text: str) -> list[OutputEvent]:
        """See `OutputParser`."""
        if text:
            self._source.feed(text)
            next(self._reading, None)
        return self._source.take_events()

    def finish(self) -> list[OutputEvent]:
        """See `OutputParser`."""
        self._source.is_over = True
        next(self._reading, None)
        self._source.close()
        return self._source.take_events()

    def _read_all(self, read: Callable[[Source], Reading[None]]) -> Reading[None]:
        yield
        yield from read(self._source)
        yield from self._source.to_the_end()
