"""The command-line reference, generated from the commands themselves.

python -m deployments.cli.command_reference > docs/command-line.md
"""

import inspect
import typing
from collections.abc import Iterator
from enum import Enum
from types import NoneType, UnionType
from typing import Any

from typer.main import get_command

from deployments.cli import app

_HEAD = """# Command line

`make install` puts `rayline` into `.venv/bin`. A command that has done what it was asked to do exits with 0. When
something is wrong, it prints one line to standard error and exits with 1; `rayline bench` exits with 2 when it cannot
begin, and with 1 when no request was answered. An option that does not exist, or a value that an option cannot take,
gives 2, and Ctrl-C 130, except that it ends `rayline serve` with 0. `--help` after any command prints what this page
says; `rayline --install-completion` has your shell complete commands and options.

This page is made from the code: `python -m deployments.cli.command_reference > docs/command-line.md`.
"""

_TABLE = "| | value | default | |\n|---|---|---|---|\n"
_TYPE_NAMES = {"str": "text", "int": "number", "float": "number", "Path": "path"}


def reference() -> str:
    """The page, in Markdown."""
    return _HEAD + "".join(_sections("rayline", get_command(app)))


def _sections(name: str, command: Any) -> Iterator[str]:
    """One section for each command below this one that can be run by itself, in the order of the help."""
    for part, child in getattr(command, "commands", {}).items():
        if hasattr(child, "commands"):
            yield from _sections(f"{name} {part}", child)
        else:
            yield _section(f"{name} {part}", child)


def _section(name: str, command: Any) -> str:
    arguments = [parameter for parameter in command.params if _is_argument(parameter)]
    options = ["[OPTIONS]"] if len(command.params) > len(arguments) else []
    usage = " ".join([name, *map(_in_usage, arguments), *options])
    text = "\n\n".join(_paragraphs(command.help or ""))
    hints = typing.get_type_hints(inspect.unwrap(command.callback), include_extras=True)
    rows = "".join(_row(parameter, hints[parameter.name]) for parameter in command.params)
    return f"\n## {name}\n\n`{usage}`\n\n{text}\n" + (f"\n{_TABLE}{rows}" if rows else "")


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of a command's help, each block of example commands as a block of code."""
    for paragraph in text.split("\n\n"):
        lines = [line.strip() for line in paragraph.splitlines()]
        if paragraph.startswith(("    ", "rayline ")):
            yield "\n".join(["```console", *(f"$ {line}" for line in lines), "```"])
        else:
            yield " ".join(lines)


def _is_argument(parameter: Any) -> bool:
    """Whether the parameter is given by its position on the command line and not by name."""
    return not parameter.opts[0].startswith("-")


def _in_usage(argument: Any) -> str:
    text = argument.name.upper() + ("..." if argument.nargs == -1 else "")
    return text if argument.required else f"[{text}]"


def _row(parameter: Any, annotation: Any) -> str:
    if _is_argument(parameter):
        names = f"`{parameter.name.upper()}`"
    else:
        names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    text = " ".join((parameter.help or "").replace("|", "\\|").split())
    if parameter.envvar:
        text += f" The environment variable `{parameter.envvar}` sets it too."
    return f"| {names} | {_value(parameter, annotation)} | {_default(parameter)} | {text} |\n"


def _value(parameter: Any, annotation: Any) -> str:
    """What is written after the option's name; nothing for a switch."""
    annotation, info = typing.get_args(annotation)
    (kind,) = [item for item in _alternatives(annotation) if item is not NoneType]
    is_repeated = typing.get_origin(kind) is list
    if is_repeated:
        (kind,) = typing.get_args(kind)
    if kind is bool:
        return ""
    if issubclass(kind, Enum):
        return ", ".join(f"`{item.value}`" for item in kind)
    again = ", several times" if is_repeated and not _is_argument(parameter) else ""
    return _TYPE_NAMES[kind.__name__] + _bounds(info.min, info.max) + again


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _bounds(least: float | None, most: float | None) -> str:
    bounds = [f"{sign} {bound:g}" for sign, bound in (("≥", least), ("≤", most)) if bound is not None]
    return f" ({', '.join(bounds)})" if bounds else ""


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if value is None:
        return ""
    if isinstance(value, bool):
        names = parameter.secondary_opts if not value and parameter.secondary_opts else parameter.opts[:1]
        return f"`{names[0]}`" if value or parameter.secondary_opts else ""
    return f"`{value.value if isinstance(value, Enum) else value}`"


if __name__ == "__main__":
    print(reference(), end="")
