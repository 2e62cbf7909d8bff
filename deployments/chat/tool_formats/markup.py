"""The exact text around a call's arguments, so that a grammar can bind them."""

from dataclasses import dataclass

NAME = "\0"
"""Stands for the tool's name."""


@dataclass(frozen=True, slots=True)
class CallMarkup:
    """How exactly a family writes calls. See `llm.sampling.tagged_calls.TaggedCalls`.

    Attributes:
        sign: part of the chat templates that teach this spelling; empty for any.
        tag, open, separator, close, lead, note: text around and between calls.
        begins: texts of which any may precede the arguments.
        end: text after the arguments.
        argument: text around each argument, if they are written one by one; `NAME` stands for its name here.
    """

    sign: str
    tag: str
    begins: tuple[str, ...]
    end: str = ""
    open: str = ""
    separator: str | None = None
    close: str = ""
    argument: tuple[str, str] | None = None
    lead: str | None = None
    note: tuple[str, str] | None = None
