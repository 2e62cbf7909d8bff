"""The base of everything that comes in a request's body."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")

Items = Annotated[list[T], Field(fail_fast=True)]
"""A list whose first wrong item ends its check: describing what is wrong takes far longer than the check itself."""


class WireModel(BaseModel):
    """No coercion, no unknown fields, no NaN."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )


class RequestBody(WireModel):
    """The body of a request."""

    model: str | None = None

    @property
    def takes_long(self) -> bool:
        """Whether it may take long to prepare, however short it is, because of a grammar, say."""
        return False


def type_tag(value: Any, default: str = "") -> str:
    """Tag of the form that a value's `type` says, in brackets, by which names of fields in errors leave it out."""
    found = value.get("type", default) if isinstance(value, dict) else getattr(value, "type", default)
    return f"[{found}]" if isinstance(found, str) else ""
