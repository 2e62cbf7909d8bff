"""The base class of everything in a request's body, and the rules on its fields.

At every depth of a body:

- `null` means absent, for a field and for an item in a list, but not for a token id in a list of token ids.
- An undeclared field is ignored, and so is one declared as `NoEffect`. An `IgnoredFields` passed as the
  validation's context collects them; if it is strict, undeclared fields are refused.
- A field declared as `Unsupported` is refused with its name, unless its value asks for nothing.
- A whole number may be written with a fraction of zero, such as `3.0`.

All other types are strict: nothing else is coerced, and NaN is not a number.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationInfo, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from deployments.chat.ignored import IgnoredFields

T = TypeVar("T")

Items = Annotated[list[T], Field(fail_fast=True)]
"""A list whose check ends at the first wrong item: describing an error takes far longer than the check itself."""

UNSUPPORTED = "unsupported_field"
"""Type of pydantic's error for a field that is refused because this server does not support it."""


class _NoEffect:
    """Marks a field whose value is always ignored."""


NoEffect = Annotated[Any, _NoEffect()]
"""A known field that cannot change the answer's meaning: ignored, whatever its value."""


class Unsupported:
    """Marks a field that would change the answer and that this server does not support.

    Args:
        harmless: values that ask for nothing, besides `null`, `false`, and an empty string or list.
    """

    def __init__(self, *harmless: Any) -> None:
        self._harmless = harmless

    def asks_for_nothing(self, value: Any) -> bool:
        """Whether the field may be ignored with this value."""
        return value is None or value is False or value in ("", []) or value in self._harmless

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Refuse every value that reaches validation."""
        return core_schema.no_info_before_validator_function(_refuse, handler(source))


def _refuse(_: Any) -> Any:
    raise PydanticCustomError(UNSUPPORTED, "is not supported by this server")


@dataclass(frozen=True, slots=True)
class _Fields:
    """How a model's fields are treated, by their names on the wire.

    Attributes:
        plain: fields that are always validated.
        unsupported: fields that are refused unless they ask for nothing.
        no_effect: fields that are always ignored.
        numbers: fields that hold a whole number.
        lists: fields that may hold a list of anything but numbers.
    """

    plain: frozenset[str]
    unsupported: Mapping[str, Unsupported]
    no_effect: frozenset[str]
    numbers: tuple[str, ...]
    lists: tuple[str, ...]


def _treatment(model: type[BaseModel]) -> _Fields:
    markers: dict[str, Any] = {}
    numbers: list[str] = []
    lists: list[str] = []
    for key, field in model.model_fields.items():
        name = field.alias or key
        markers[name] = next((mark for mark in field.metadata if isinstance(mark, (_NoEffect, Unsupported))), None)
        forms = _forms(field.annotation)
        if int in forms and float not in forms:
            numbers.append(name)
        if any(get_origin(form) is list and int not in _forms(get_args(form)[0]) for form in forms):
            lists.append(name)
    return _Fields(
        frozenset(name for name, mark in markers.items() if mark is None),
        {name: mark for name, mark in markers.items() if isinstance(mark, Unsupported)},
        frozenset(name for name, mark in markers.items() if isinstance(mark, _NoEffect)),
        tuple(numbers),
        tuple(lists),
    )


def _forms(annotation: Any) -> list[Any]:
    """The types that a field may hold, taken out of unions and annotations."""
    if get_origin(annotation) is Annotated:
        return _forms(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [form for part in get_args(annotation) for form in _forms(part)]
    return [annotation]


class WireModel(BaseModel):
    """An object of a request, to which the rules on fields apply."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
        json_schema_extra=lambda schema: schema.pop("additionalProperties", None),  # undeclared fields are ignored
    )

    _fields: ClassVar[_Fields]

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Determine once how the fields are treated."""
        cls._fields = _treatment(cls)

    @model_validator(mode="before")
    @classmethod
    def _apply_rule(cls, value: Any, info: ValidationInfo) -> Any:
        if type(value) is not dict:
            return value
        fields = cls._fields
        kept = value
        if not value.keys() <= fields.plain or None in value.values():
            kept = _kept(value, fields, cls.__name__, info.context)
        changed = _normalized(kept, fields) if fields.numbers or fields.lists else None
        return {**kept, **changed} if changed else kept


class RequestBody(WireModel):
    """The body of a request."""

    model: str | None = None
    """Name of a model, an alias or an adapter, as `/v1/models` gives it. May be left out where there is one model."""

    @property
    def takes_long(self) -> bool:
        """Whether it may take long to prepare even if it is short, for example because of a grammar."""
        return False


def note_ignored(info: ValidationInfo, kind: str, owner: dict[str, Any], name: str) -> None:
    """Note that a custom validator ignored a field; see `IgnoredFields.note`."""
    if isinstance(info.context, IgnoredFields):
        info.context.note(kind, owner, name)


def is_strict(info: ValidationInfo) -> bool:
    """Whether a custom validator must refuse unknown fields."""
    return isinstance(info.context, IgnoredFields) and info.context.is_strict


def type_tag(value: Any, default: str = "") -> str:
    """Tag of the form that a value's `type` names. Its brackets mark it, so field names in errors leave it out."""
    found = value.get("type", default) if isinstance(value, dict) else getattr(value, "type", default)
    return f"[{found}]" if isinstance(found, str) else ""


def _kept(value: dict[str, Any], fields: _Fields, kind: str, context: Any) -> dict[str, Any]:
    """The object without the fields that are ignored."""
    ignored = context if isinstance(context, IgnoredFields) else None
    is_strict = ignored is not None and ignored.is_strict
    kept = {}
    for name, item in value.items():
        if item is None:
            continue
        unsupported = fields.unsupported.get(name)
        is_ignored = (
            unsupported.asks_for_nothing(item) if unsupported is not None
            else name not in fields.plain and (name in fields.no_effect or not is_strict)
        )  # fmt: skip
        if not is_ignored:
            kept[name] = item
        elif ignored is not None:
            ignored.note(kind, value, name)
    return kept


def _normalized(value: dict[str, Any], fields: _Fields) -> dict[str, Any]:
    """Fix fields whose whole numbers were written as floats or whose lists held `null`."""
    changed: dict[str, Any] = {}
    for name in fields.numbers:
        number = value.get(name)
        if type(number) is float and number.is_integer():
            changed[name] = int(number)
    for name in fields.lists:
        items = value.get(name)
        if type(items) is list and None in items:
            changed[name] = [item for item in items if item is not None]
    return changed
