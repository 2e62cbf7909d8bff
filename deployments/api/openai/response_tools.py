"""Tools of OpenAI's Responses API, and the chat functions that they stand for.

After https://platform.openai.com/docs/api-reference/responses/create. A `namespace` groups functions: Codex offers the
tools of each MCP server this way. A model sees one list of functions, in which such a function is called
`<namespace>__<name>`; its calls are returned in the client's terms, with name and namespace separate. Tools that a
server would have to run itself (`web_search`, `mcp`, …) and tools that are not functions (`custom`, …) are left out.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Tag, field_validator

from deployments.chat.errors import APIError, invalid
from deployments.chat.skipped import AnySkipped
from deployments.chat.tools import ToolName
from deployments.chat.wire_model import Items, NoEffect, WireModel, type_tag

_MAX_NAME_CHARS = 128


class ResponseFunction(WireModel):
    """A function that the model may call."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: NoEffect = None
    """Ignored: the model is told about every function at once."""
    output_schema: NoEffect = None


def _function_tag(value: Any) -> str:
    return tag if (tag := type_tag(value, "function")) == "[function]" else "[skipped]"


NamespacedTool = Annotated[Annotated[ResponseFunction, Tag("[function]")] | AnySkipped, Discriminator(_function_tag)]


class ResponseNamespace(WireModel):
    """Functions under a common name."""

    type: Literal["namespace"]
    name: str
    description: str | None = None
    tools: Items[NamespacedTool] | None = None


def _tool_tag(value: Any) -> str:
    return tag if (tag := type_tag(value)) in ("[function]", "[namespace]") else "[skipped]"


ResponseTool = Annotated[
    Annotated[ResponseFunction, Tag("[function]")] | Annotated[ResponseNamespace, Tag("[namespace]")] | AnySkipped,
    Discriminator(_tool_tag),
]


class NamedChoice(WireModel):
    """Call this function and no other."""

    type: Literal["function"]
    name: str
    namespace: str | None = None


AllowedTool = Annotated[Annotated[NamedChoice, Tag("[function]")] | AnySkipped, Discriminator(_function_tag)]


class AllowedTools(WireModel):
    """Call only these tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Items[AllowedTool]
    """Tools of other kinds are left out, as they are of the request's `tools`."""

    @field_validator("tools")
    @classmethod
    def _keep_functions(cls, tools: list[Any]) -> list[Any]:
        return [tool for tool in tools if isinstance(tool, NamedChoice)]


def _choice_tag(value: Any) -> str:
    return "[mode]" if isinstance(value, str) else type_tag(value)


ResponseToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("[mode]")]
    | Annotated[NamedChoice, Tag("[function]")]
    | Annotated[AllowedTools, Tag("[allowed_tools]")],
    Discriminator(
        _choice_tag, "choice_type", "must be none, auto, required, a function, or allowed_tools; tools of other kinds "
        "cannot be chosen",
    ),
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class FunctionId:
    """A client's name for a function."""

    name: str
    namespace: str | None = None

    @property
    def chat_name(self) -> str:
        """The model's name for it: at most 128 characters, all of them allowed in tool names."""
        if self.namespace is None:
            return self.name
        joint = "" if self.namespace.endswith("__") else "__"
        name = re.sub(r"[^a-zA-Z0-9_-]", "_", f"{self.namespace}{joint}{self.name}")
        if len(name) <= _MAX_NAME_CHARS:
            return name
        digest = sha256(f"{self.namespace}\0{self.name}".encode(errors="surrogatepass")).hexdigest()[:8]
        return f"{name[: _MAX_NAME_CHARS - 9]}_{digest}"

    def fields(self) -> dict[str, str]:
        """Its name as the fields of an item."""
        return {"name": self.name} | ({"namespace": self.namespace} if self.namespace is not None else {})


@dataclass(frozen=True, slots=True)
class OfferedFunction:
    """A function that the model is told about.

    Attributes:
        id: the client's name for it.
        function: its definition.
        place: where it is in the request, such as `tools[2].tools[0]`.
    """

    id: FunctionId
    function: ResponseFunction
    place: str


@dataclass(frozen=True, slots=True)
class FunctionNames:
    """Finds the functions of a request by the model's names for them."""

    ids: dict[str, FunctionId] = field(default_factory=dict)

    @classmethod
    def of(cls, functions: Iterable[OfferedFunction]) -> Self:
        """The names of these functions."""
        return cls({offered.id.chat_name: offered.id for offered in functions})

    def find(self, name: str) -> FunctionId:
        """The function that a model's call names. Models may omit the namespace if only one function has the name."""
        if name in self.ids:
            return self.ids[name]
        same = [function for function in self.ids.values() if function.name == name]
        return same[0] if len(same) == 1 else FunctionId(name)

    def chosen(self, choice: NamedChoice) -> dict[str, Any]:
        """A function that the client has chosen, as the choice is written in a chat."""
        name = self.find(FunctionId(choice.name, choice.namespace).chat_name).chat_name
        return {"type": "function", "function": {"name": name}}


def functions_of(tools: Iterable[Any], place: str = "tools", namespace: str | None = None) -> list[OfferedFunction]:
    """The functions that the model is told about.

    Args:
        tools: all tools, including those to be left out.
        place: where they are in the request.
        namespace: the namespace that groups them.
    """
    found = []
    for i, tool in enumerate(tools):
        if isinstance(tool, ResponseFunction):
            found.append(OfferedFunction(FunctionId(tool.name, namespace), tool, f"{place}[{i}]"))
        elif isinstance(tool, ResponseNamespace):
            found += functions_of(tool.tools or (), f"{place}[{i}].tools", tool.name)
    return found


def chat_tools(functions: Sequence[OfferedFunction], choice: Any) -> tuple[list[dict[str, Any]], Any]:
    """The `tools` and the `tool_choice` of a chat."""
    names = FunctionNames.of(functions)
    if isinstance(choice, AllowedTools):
        if not choice.tools:
            raise invalid("tool_choice: allows no function, and tools of other kinds are not run here", "tool_choice")
        allowed = {
            "mode": choice.mode,
            "tools": [names.chosen(tool) for tool in choice.tools if isinstance(tool, NamedChoice)],
        }
        choice = {"type": "allowed_tools", "allowed_tools": allowed}
    elif isinstance(choice, NamedChoice):
        choice = names.chosen(choice)
    written = [
        {
            "type": "function",
            "function": {**offered.function.model_dump(exclude={"type"}), "name": offered.id.chat_name},
        }
        for offered in functions
    ]
    return written, choice


def at_own_place(error: APIError, functions: Sequence[OfferedFunction]) -> APIError:
    """An error about one of a chat's tools, changed to name the tool's place in the original request."""
    found = re.match(r"tools\[(\d+)\]", error.param or "")
    if found is not None and error.param is not None and int(found[1]) < len(functions):
        old, place = error.param, functions[int(found[1])].place
        error.param = place + old[found.end() :].replace(".function", "", 1)
        error.message = error.message.replace(old, error.param)
    return error


def echoed_tool(tool: Any) -> dict[str, Any]:
    """A tool as its response repeats it."""
    if isinstance(tool, ResponseNamespace):
        tools = [echoed_tool(offered.function) for offered in functions_of(tool.tools or ())]
        return {"type": "namespace", "name": tool.name, "description": tool.description or "", "tools": tools}
    return {"strict": None, **tool.model_dump(exclude={"defer_loading", "output_schema"})}
