"""Tools in requests: which may be called, which must be called, and how a grammar forces a call."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from deployments.chat.errors import invalid
from deployments.chat.tool_formats.markup import NAME, CallMarkup
from deployments.chat.wire_model import Items, NoEffect, WireModel, type_tag
from llm.sampling.json_schema import relocated
from llm.sampling.tagged_calls import TaggedCall, TaggedCalls
from llm.serving.schemas import Grammar, GrammarKind

MAX_TOOLS = 1024

ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]


def _check_tool_type(value: Any) -> Any:
    if isinstance(value, str) and value != "function":
        raise ValueError(f"tools of the type {value[:40]!r} are not supported by this server; only functions are")
    return value


def _as_text(value: Any) -> Any:
    """Any value as text, such as arguments, which some servers and clients send as an object."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


Written = Annotated[str, BeforeValidator(_as_text, json_schema_input_type=Any)]
"""What a model, or the server that ran it, once wrote. It should be a string."""


class FunctionDefinition(WireModel):
    """A function that the model may call."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of its arguments, which are an object; without it, any object is accepted."""
    strict: bool | None = None
    """Calls that the model decides to make follow the schema too, and a schema that cannot be followed is refused."""


class Tool(WireModel):
    """A tool."""

    type: Annotated[Literal["function"], BeforeValidator(_check_tool_type, json_schema_input_type=str)] = "function"
    function: FunctionDefinition


class FunctionName(WireModel):
    """The name of a function."""

    name: ToolName


class NamedToolChoice(WireModel):
    """Call this function and no other."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(WireModel):
    """Some of the tools, by their names."""

    mode: Literal["auto", "required"]
    tools: Annotated[Items[NamedToolChoice], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedToolsChoice(WireModel):
    """Call only these tools; the model is not told about any others."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _choice_tag(value: Any) -> str:
    return "[word]" if isinstance(value, str) else type_tag(value)


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("[word]")]
    | Annotated[NamedToolChoice, Tag("[function]")]
    | Annotated[AllowedToolsChoice, Tag("[allowed_tools]")],
    Discriminator(
        _choice_tag,
        "tool_choice_type",
        "must be none, auto, required, a function by its name, or allowed_tools with functions by their names",
    ),
]


class FunctionCall(WireModel):
    """What a call asks for, as the model wrote it."""

    name: Written = ""
    arguments: Written = ""
    """A JSON object as text, if the model made no mistake."""


class CustomCall(WireModel):
    """A call with plain text in place of arguments."""

    name: Written = ""
    input: Written = ""


class ToolCall(WireModel):
    """A call that the model made in an earlier turn."""

    id: Written = ""
    type: Written = "function"
    function: FunctionCall | None = None
    custom: CustomCall | None = None
    index: NoEffect = None
    """Ignored: the call's number in the stream from which it was assembled."""

    @property
    def arguments(self) -> str:
        """What the model wrote as arguments."""
        if self.function is not None:
            return self.function.arguments
        return self.custom.input if self.custom is not None else ""

    def turn(self) -> dict[str, Any]:
        """The call in the form that chat templates expect, with arguments as an object, or as text if they are not
        one."""
        called = self.function or self.custom
        function = {"name": called.name if called is not None else "", "arguments": _object_or_text(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}


def _object_or_text(text: str) -> dict[str, Any] | str:
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def check_tools(tools: Sequence[Tool] | None, choice: ToolChoice | None) -> None:
    """Refuse tools with the same name, parameters that do not describe an object, and a choice of a missing tool.

    Raises:
        APIError: a 400 with the field at fault.
    """
    names: set[str] = set()
    for i, tool in enumerate(tools or ()):
        name, parameters = tool.function.name, tool.function.parameters
        if name in names:
            raise invalid(f"tools: two are named {name!r}", f"tools[{i}].function.name")
        names.add(name)
        if parameters and parameters.get("type", "object") != "object":
            raise invalid("tools: parameters must describe an object", f"tools[{i}].function.parameters")
    if choice not in (None, "none", "auto") and not names:
        raise invalid("tool_choice: there are no tools to choose from", "tool_choice")
    for name in _chosen_names(choice):
        if name not in names:
            raise invalid(f"tool_choice: there is no tool {name!r}", "tool_choice")


def _chosen_names(choice: ToolChoice | None) -> list[str]:
    if isinstance(choice, AllowedToolsChoice):
        return [tool.function.name for tool in choice.allowed_tools.tools]
    return [choice.function.name] if isinstance(choice, NamedToolChoice) else []


def allowed_tools(
    tools: Sequence[Tool] | None, choice: ToolChoice | None
) -> tuple[list[Tool] | None, Literal["none", "auto", "required"] | NamedToolChoice | None]:
    """The tools that the model may be told about, and the choice among them."""
    if not tools:
        return None, None
    if not isinstance(choice, AllowedToolsChoice):
        return list(tools), choice
    names = set(_chosen_names(choice))
    return [tool for tool in tools if tool.function.name in names], choice.allowed_tools.mode


def forced_grammar(tools: Sequence[Tool], choice: ToolChoice | None, *, may_be_many: bool) -> Grammar | None:
    """What an answer that must make a call has to look like; None if it need not make one.

    Such an answer is a JSON list of calls, or a single call if a tool is named.
    """
    if isinstance(choice, NamedToolChoice):
        chosen = [tool for tool in tools if tool.function.name == choice.function.name]
        schema = _call_schema(chosen[0])
    elif choice == "required":
        chosen = list(tools)
        schema = {"type": "array", "items": {"anyOf": [_call_schema(tool) for tool in tools]}, "minItems": 1}
        schema |= {} if may_be_many else {"maxItems": 1}
    else:
        return None
    definitions = {
        tool.function.name: relocated(arguments_schema(tool), f"#/$defs/{tool.function.name}") for tool in chosen
    }
    # Strict tools are checked separately.
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps({**schema, "$defs": definitions}), is_lenient=True)


def strict_grammar(tools: Sequence[Tool], markup: CallMarkup, *, may_be_many: bool) -> Grammar | None:
    """Free text in which calls follow the schemas; None if no tool is strict."""
    if not any(tool.function.strict for tool in tools):
        return None
    calls = [
        TaggedCall(
            begins=tuple(begin.replace(NAME, tool.function.name) for begin in markup.begins),
            parameters=arguments_schema(tool),
            is_strict=bool(tool.function.strict),
            end=markup.end,
        )
        for tool in tools
    ]
    form = TaggedCalls(
        tag=markup.tag,
        open=markup.open,
        calls=tuple(calls),
        separator=markup.separator,
        close=markup.close,
        is_single=not may_be_many,
        argument=markup.argument,
        lead=markup.lead,
        note=markup.note,
    )
    return Grammar(kind=GrammarKind.CALLS, text=json.dumps(form.model_dump()))


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """What a tool's arguments must look like: an object, which is empty if there are no parameters."""
    parameters = tool.function.parameters or {}
    if not parameters.get("properties") and not parameters.keys() - _DESCRIBING:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **parameters}


_DESCRIBING = frozenset({"$id", "$schema", "description", "properties", "required", "strict", "title", "type"})


def _call_schema(tool: Tool) -> dict[str, Any]:
    name = tool.function.name
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{name}"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
