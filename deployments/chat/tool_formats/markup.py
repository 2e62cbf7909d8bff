"""What stands around a call's arguments, to the letter, so that a grammar can bind them."""

from dataclasses import dataclass

NAME = "\0"
"""Stands for the tool's name."""


@dataclass(frozen=True, slots=True)
class CallMarkup:
    """How a family writes calls, to the letter. See `llm.sampling.tagged_calls.TaggedCalls`.

    Attributes:
        sign: part of the chat templates that teach this spelling; empty for any.
        tag, open, separator, close, lead, note: around and between calls.
        begins: in front of the arguments, any of these.
        end: behind the arguments.
        argument: around each argument, where they are written one by one; `NAME` stands for its name here.
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
