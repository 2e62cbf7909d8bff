"""Parts of a request that are left out: kinds that this server does not support and that the answer can do without."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import PlainValidator, Tag, ValidationInfo

from deployments.chat.wire_model import is_strict, note_ignored


@dataclass(frozen=True, slots=True)
class Skipped:
    """A tool or an item of a kind that this server does not support, as received."""

    value: dict[str, Any]


def skip(value: Any, info: ValidationInfo) -> Skipped:
    """Accept a part that is left out, and note that it is ignored.

    Raises:
        ValueError: it has no type, or the request is checked strictly.
    """
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise ValueError("must be an object with a type")
    if is_strict(info):
        raise ValueError(f"the type {value['type'][:40]!r} is not supported by this server")
    note_ignored(info, f"type {value['type'][:40]}", value, "type")
    return Skipped(value)


AnySkipped = Annotated[Skipped, PlainValidator(skip, json_schema_input_type=dict[str, Any]), Tag("[skipped]")]
"""Anything with a type, as one member of a tagged union."""
