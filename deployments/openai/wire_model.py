"""The base of everything that comes in a request's body."""

from pydantic import BaseModel, ConfigDict


class WireModel(BaseModel):
    """No coercion, no unknown fields, no NaN."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )
