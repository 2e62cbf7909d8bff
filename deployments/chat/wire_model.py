"""The base of everything that comes in a request's body."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class WireModel(BaseModel):
    """No coercion, no unknown fields, no NaN."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )


def type_tag(value: Any, default: str = "") -> str:
    """Tag of the form that a value's `type` says, in brackets, by which names of fields in errors leave it out."""
    found = value.get("type", default) if isinstance(value, dict) else getattr(value, "type", default)
    return f"[{found}]" if isinstance(found, str) else ""
