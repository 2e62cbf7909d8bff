"""`StrictModel`: the base of everything that is configured; and what is said of values that it refuses."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator


class StrictModel(BaseModel):
    """Frozen pydantic model that refuses unknown keys and says which known one is nearest."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    near = get_close_matches(str(key), cls.model_fields, n=1)
                    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(cls.model_fields)}"
                    raise ValueError(f"unknown key {str(key)[:80]!r}; {hint}")
        return data


def describe(error: ValidationError, names: Mapping[str, str] | None = None) -> str:
    """One line on what pydantic found wrong.

    Args:
        names: maps fields to the names that they have in the value's source, where those differ.
    """
    renamed = names or {}
    return "; ".join(
        f"{'.'.join(renamed.get(str(part), str(part)) for part in item['loc'])}: {item['msg']}"
        if item["loc"]
        else item["msg"].removeprefix("Value error, ")
        for item in error.errors()
    )
