"""Tools in requests: what may be called, what must be, and how a call that must be is put into a grammar."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from deployments.chat.errors import invalid
from deployments.chat.wire_model import WireModel
from llm.serving.schemas import Grammar, GrammarKind

MAX_TOOLS = 128

ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class FunctionDefinition(WireModel):
    """A function that the model may ask for."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of its arguments, an object; none for any object."""
    strict: bool | None = None
    """Accepted. Calls that are forced by `tool_choice` always keep to the schema."""


class Tool(WireModel):
    """A tool."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(WireModel):
    """A function by its name."""

    name: ToolName


class NamedToolChoice(WireModel):
    """This one, and no other."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice


class FunctionCall(WireModel):
    """What a call asks for."""

    name: ToolName
    arguments: str
    """A JSON object, as text."""


class ToolCall(WireModel):
    """A call that the model made in an earlier turn."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: FunctionCall


def check_tools(tools: Sequence[Tool] | None, choice: ToolChoice | None) -> None:
    """Refuse tools of the same name, parameters that describe no object, and a choice of what is not there.

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
    if choice not in (None, "none") and not names:
        raise invalid("tool_choice: there are no tools to choose from", "tool_choice")
    if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
        raise invalid(f"tool_choice: there is no tool {choice.function.name!r}", "tool_choice")


def forced_grammar(tools: Sequence[Tool], choice: ToolChoice | None, *, may_be_many: bool) -> Grammar | None:
    """What an answer must look like that must call; None where it need not.

    Such an answer is a JSON list of calls, or one call by itself where a tool is named.
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
    definitions = {tool.function.name: _moved(tool.function.parameters or {}, tool.function.name) for tool in chosen}
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps({**schema, "$defs": definitions}))


def _call_schema(tool: Tool) -> dict[str, Any]:
    name = tool.function.name
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{name}"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(parameters: dict[str, Any], name: str) -> dict[str, Any]:
    """A tool's schema under `$defs`, with its references within itself made to fit the new place."""

    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(item) for item in value]
        if not isinstance(value, dict):
            return value
        moved = {key: move(item) for key, item in value.items()}
        reference = value.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            moved["$ref"] = f"#/$defs/{name}{reference[1:]}"
        return moved

    return {"type": "object", **move(parameters)}
