"""The configuration reference, generated from the models that validate configurations.

python -m deployments.cli.config_reference > docs/configuration.md
"""

import typing
from enum import Enum
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from deployments.config import AppConfig
from deployments.model_config import ServedModelConfig

_HEAD = """# Configuration

Every setting that `args` in `serve_config.yaml` takes. An unknown one is refused with the nearest that exists;
`rayline check FILE` does so without starting anything. `rayline serve --set NAME=VALUE` sets any of them.

This page is made from the code: `python -m deployments.cli.config_reference > docs/configuration.md`.
"""

_TABLE = "| setting | type | default | |\n|---|---|---|---|\n"


class _Section(NamedTuple):
    """A heading with a table below it: some fields of a group."""

    title: str
    prefix: str
    group: type[BaseModel]
    names: list[str]


def reference() -> str:
    """The page, in Markdown."""
    sections = [_HEAD]
    own = [name for name in AppConfig.model_fields if name not in ServedModelConfig.model_fields]
    pending = [
        _Section("Top level", "", AppConfig, own),
        _Section("A model", "", ServedModelConfig, list(ServedModelConfig.model_fields)),
    ]
    while pending:
        title, prefix, model, names = pending.pop(0)
        sections.append(f"\n## {title}\n\n{_one_line(model.__doc__ or '')}\n\n{_TABLE}")
        for name in names:
            field = model.model_fields[name]
            group = _group(field)
            if group is not None:
                pending.append(_Section(f"{prefix}{name}", f"{prefix}{name}.", group, list(group.model_fields)))
            sections.append(_row(prefix + name, field, group))
    return "".join(sections)


def _row(name: str, field: FieldInfo, group: type[BaseModel] | None) -> str:
    text = _one_line(field.description or "")
    if group is not None:
        text = f"{text} See [{name}](#{name.replace('.', '').lower()}).".strip()
    kind = " ".join(part for part in ("group" if group else _type(field.annotation), _bounds(field)) if part)
    return f"| `{name}` | {kind} | {_default(field)} | {text} |\n"


def _bounds(field: FieldInfo) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [
        f"{sign} {getattr(item, key)}" for item in field.metadata for key, sign in signs.items() if hasattr(item, key)
    ]
    return f"({', '.join(bounds)})" if bounds else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is PydanticUndefined or isinstance(value, BaseModel):
        return ""
    if value is None or value == ():
        return "none"
    return f"`{value.value if isinstance(value, Enum) else str(value).lower() if isinstance(value, bool) else value}`"


def _group(field: FieldInfo) -> type[BaseModel] | None:
    """The model type of a field, if its value is a model; None for a list of models."""
    if get_origin(field.annotation) is tuple:
        return None
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin in (typing.Union, UnionType):
        return " or ".join(_type(part) for part in get_args(annotation) if part is not type(None))
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin is typing.Annotated:
        return _type(get_args(annotation)[0])
    if origin is not None:
        return "mapping" if origin is dict else "list"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(f"`{item.value}`" for item in annotation)
    names = {"str": "text", "int": "number", "float": "number", "bool": "`true` or `false`", "SecretStr": "text"}
    return names.get(getattr(annotation, "__name__", ""), str(annotation))


def _one_line(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    print(reference(), end="")
