"""Keeps control tokens that a user types from becoming control tokens.

A chat template mixes a request's strings with the control tokens that it writes itself. Before rendering, `Disguise`
replaces every control token in the request's strings by a stand-in character; after it, what still looks like a control
token was written by the template, and the stand-ins go back to plain text.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from llm.errors import InvalidRequestError

_SURROGATE = re.compile("[\ud800-\udfff]")
# Tangut, in which neither control tokens nor templates are written. Where a request holds these characters, they get
# stand-ins like control tokens. They are letters, which Python leaves as they are where a template prints an object.
_STAND_INS = range(0x17000, 0x17BF0)
_GUARD = "\U000187f7"
_STAND_IN = f"[{chr(_STAND_INS.start)}-{_GUARD}]"
_STAND_IN_PATTERN = re.compile(_STAND_IN)
_SLICE_CHARS = 1 << 18
_NOT_ASCII = re.compile(r"[^\x00-\x7e]")
_MARKUP = re.compile(r"<\S+>|\[\S+\]")


@dataclass(frozen=True, slots=True)
class ControlToken:
    """A token that stands for structure, not for text."""

    token_id: int
    text: str
    is_special: bool
    """Whether the tokenizer leaves it out of decoded text (`<|im_end|>`, unlike `<think>`)."""
    strips_left: bool = False
    strips_right: bool = False


def is_markup(text: str) -> bool:
    """Whether an added token that is not marked special looks like one: `<think>`, `<tool_call>`, `[TOOL_CALLS]`."""
    return _MARKUP.fullmatch(text) is not None


class ControlTokens:
    """The control tokens of one tokenizer, and how to find them in text."""

    def __init__(self, tokens: Iterable[ControlToken]) -> None:
        self.by_text = {token.text: token for token in tokens if token.text}
        self.ids = frozenset(token.token_id for token in self.by_text.values())
        self.pattern = _any_of(self.by_text)
        self.disguised_pattern = _any_of(self.by_text, _STAND_IN)
        self.special_pattern = _any_of((token.text for token in self.by_text.values() if token.is_special), _STAND_IN)
        self._starts = {text[:end] for text in self.by_text for end in range(1, len(text))}
        self._longest_start = max(map(len, self._starts), default=0)
        self.longest = self._longest_start + 1

    def split(self, text: str) -> Iterator[tuple[int, str, ControlToken | None]]:
        """Cut `text` at its control tokens: (offset of the plain piece, the piece, the token behind it)."""
        offset = 0
        for match in self.pattern.finditer(text):
            token = self.by_text[match[0]]
            piece = text[offset : match.start()]
            yield offset, piece.rstrip() if token.strips_left else piece, token
            offset = match.end()
            if token.strips_right:
                offset += len(text[offset:]) - len(text[offset:].lstrip())
        yield offset, text[offset:], None

    def ends_in_start(self, text: str) -> bool:
        """Whether `text` ends with the start of a control token, which what follows could make whole."""
        return any(text[-length:] in self._starts for length in range(1, min(len(text), self._longest_start) + 1))


class Disguise:
    """Stand-ins for the control tokens in one request's strings.

    Messages of the assistant keep control tokens that are not special: the reasoning and tool-call marks that the
    model wrote itself, which templates look for.

    Attributes:
        is_used: whether any string was changed, so that `reveal` is needed.
    """

    def __init__(self, control: ControlTokens) -> None:
        self._control = control
        self._stand_ins: dict[str, str] = {}
        self.is_used = False

    def messages(self, messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Copy of chat messages with disguised strings; keys without a value are left out, but for `content`."""
        return [
            {
                key: self.apply(value, self._control.special_pattern if message.get("role") == "assistant" else None)
                for key, value in message.items()
                if value is not None or key == "content"
            }
            for message in messages
        ]

    def apply(self, value: Any, pattern: re.Pattern[str] | None = None) -> Any:
        """Copy of a JSON value with every string in it disguised, keys included."""
        if isinstance(value, str):
            return self._text(value, pattern or self._control.disguised_pattern)
        if isinstance(value, dict):
            return {self.apply(key, pattern): self.apply(item, pattern) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.apply(item, pattern) for item in value]
        return value

    def reveal(self, text: str) -> str:
        """The text as the user wrote it."""
        originals = {_GUARD: "", **{stand_in: original for original, stand_in in self._stand_ins.items()}}
        originals |= {_twin(stand_in): json.dumps(original)[1:-1] for original, stand_in in self._stand_ins.items()}
        return replace(_STAND_IN_PATTERN, lambda match: originals.get(match[0], match[0]), text, 1)

    def _text(self, text: str, pattern: re.Pattern[str]) -> str:
        disguised = replace(pattern, self._stand_in, without_surrogates(text), self._control.longest)
        if self._control.ends_in_start(disguised):
            self.is_used = True
            disguised += _GUARD
        return disguised

    def _stand_in(self, match: re.Match[str]) -> str:
        self.is_used = True
        stand_in = self._stand_ins.get(match[0])
        if stand_in is None:
            if len(self._stand_ins) == len(_STAND_INS):
                raise InvalidRequestError("the messages hold too many different control tokens", param="messages")
            stand_in = self._stand_ins[match[0]] = chr(_STAND_INS[len(self._stand_ins)])
        return stand_in


def without_surrogates(text: str) -> str:
    """`text` with lone surrogates, which no tokenizer can take, replaced by U+FFFD."""
    return text if text.isascii() else replace(_SURROGATE, lambda _: "\ufffd", text, 1)


def replace(pattern: re.Pattern[str], new: Callable[[re.Match[str]], str], text: str, longest: int) -> str:
    """`pattern.sub(new, text)` in slices, between which other threads get a turn: a search holds the interpreter's lock
    from its beginning to its end.

    Args:
        longest: characters of the longest match; a match depends on nothing outside it.
    """
    if len(text) <= _SLICE_CHARS:
        return pattern.sub(new, text)
    parts = []
    done = 0
    for start in range(0, len(text), _SLICE_CHARS):
        end = start + _SLICE_CHARS
        while (match := pattern.search(text, max(start, done), end + longest)) and match.start() < end:
            parts += [text[done : match.start()], new(match)]
            done = match.end()
    return "".join([*parts, text[done:]])


def _any_of(texts: Iterable[str], *patterns: str) -> re.Pattern[str]:
    """Matches the longest of `texts`, or one of the patterns; nothing where there are none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, longest_first), *patterns]) or r"(?!)")


def ascii_only(text: str) -> str:
    """JSON with all but ASCII escaped; stand-ins become those of what is escaped."""
    return _NOT_ASCII.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    if ord(character) in _STAND_INS:
        return _twin(character)
    return character if _STAND_IN_PATTERN.match(character) else json.dumps(character)[1:-1]


def _twin(stand_in: str) -> str:
    """The stand-in of the same text in ASCII."""
    return chr(ord(stand_in) + len(_STAND_INS))


def find_control_tokens(tokenizer: RustTokenizer, named: Collection[str]) -> ControlTokens:
    """Special tokens and markup of a tokenizer."""
    added = tokenizer.get_added_tokens_decoder()
    return ControlTokens(
        ControlToken(token_id, token.content, token.special or token.content in named, token.lstrip, token.rstrip)
        for token_id, token in added.items()
        if token.special or token.content in named or is_markup(token.content)
    )
