"""How requests say what an answer must look like: `response_format`, and vLLM's `guided_…` fields."""

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from deployments.chat.errors import APIError, invalid
from deployments.chat.wire_model import Items, NoEffect, WireModel
from llm.errors import InvalidRequestError
from llm.serving.schemas import Grammar, GrammarKind

MAX_CHOICES = 4096

NonEmpty = Annotated[str, Field(min_length=1)]


class JsonSchemaFormat(WireModel):
    """A schema and its name."""

    name: NoEffect = None
    description: NoEffect = None
    schema_: Annotated[dict[str, Any] | bool, Field(alias="schema")]
    strict: NoEffect = None
    """Ignored: answers always follow the schema."""


class ResponseFormat(WireModel):
    """Format of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    """The schema, if the type is `json_schema`."""
    schema_: Annotated[dict[str, Any] | bool | None, Field(alias="schema")] = None
    """Extension. The schema beside the type, which may be `json_object` too, as llama.cpp and others have it."""


class StructuredOutputs(WireModel):
    """One way to bind an answer."""

    json_: Annotated[str | dict[str, Any] | bool | None, Field(alias="json")] = None
    """A JSON schema, or its text."""
    json_object: bool | None = None
    regex: NonEmpty | None = None
    choice: Annotated[Items[NonEmpty], Field(min_length=1, max_length=MAX_CHOICES)] | None = None
    grammar: NonEmpty | None = None


class StructuredFields(WireModel):
    """Fields that bind an answer to a grammar; at most one may be given."""

    response_format: ResponseFormat | None = None
    guided_json: str | dict[str, Any] | bool | None = None
    """Extension. A JSON schema, or its text."""
    guided_regex: NonEmpty | None = None
    """Extension. A regular expression that the whole answer matches."""
    guided_choice: Annotated[Items[NonEmpty], Field(min_length=1, max_length=MAX_CHOICES)] | None = None
    """Extension. Strings, of which the answer is one."""
    guided_grammar: NonEmpty | None = None
    """Extension. A grammar in llguidance's variant of Lark."""
    structured_outputs: StructuredOutputs | None = None
    """Extension. The same under vLLM's newer name."""


def grammar_of(body: StructuredFields) -> tuple[str, Grammar] | None:
    """The field that binds the answer, and its grammar; None if the answer is free.

    Raises:
        APIError: there are several such fields, or a schema is missing.
    """
    given: dict[str, Grammar] = {}
    if body.response_format is not None and (formatted := _format_grammar(body.response_format)) is not None:
        given["response_format"] = formatted
    guides = {
        "guided_json": body.guided_json,
        "guided_regex": body.guided_regex,
        "guided_choice": body.guided_choice,
        "guided_grammar": body.guided_grammar,
    }
    if body.structured_outputs is not None:
        newer = body.structured_outputs
        if newer.json_object:
            given["structured_outputs.json_object"] = Grammar(kind=GrammarKind.JSON_OBJECT)
        for name in ("json", "regex", "choice", "grammar"):
            guides[f"structured_outputs.{name}"] = getattr(newer, "json_" if name == "json" else name)
    for name, guide in guides.items():
        if guide is not None:
            given[name] = _GUIDES[name.removeprefix("structured_outputs.").removeprefix("guided_")](guide)
    if len(given) > 1:
        raise invalid(f"{' and '.join(given)}: give one of them", next(iter(given)))
    return next(iter(given.items()), None)


def _format_grammar(response_format: ResponseFormat) -> Grammar | None:
    """The grammar of a `response_format`; None if it leaves the answer free.

    Raises:
        APIError: a schema is missing, or there are too many.
    """
    kind, inner, beside = response_format.type, response_format.json_schema, response_format.schema_
    if inner is not None and kind != "json_schema":
        raise invalid("response_format: json_schema goes with the type json_schema", "response_format.json_schema")
    if beside is not None and (kind == "text" or inner is not None):
        why = "goes with the types json_object and json_schema" if inner is None else "is there twice; give it once"
        raise invalid(f"response_format: schema {why}", "response_format.schema")
    if kind == "json_schema" and inner is None and beside is None:
        raise invalid("response_format: json_schema is missing", "response_format.json_schema")
    schema = inner.schema_ if inner is not None else beside
    if schema is not None:
        return _schema(schema)
    return Grammar(kind=GrammarKind.JSON_OBJECT) if kind == "json_object" else None


def grammar_error(error: InvalidRequestError, param: str) -> APIError:
    """The error for a wrong grammar, which names the field that it came with."""
    return invalid(f"{param}: {str(error).removeprefix('grammar: ')}", param, error.code)


_GUIDES: Mapping[str, Callable[[Any], Grammar]] = {
    "json": lambda schema: _schema(schema),
    "regex": lambda regex: Grammar(kind=GrammarKind.REGEX, text=regex),
    "choice": lambda choices: Grammar(kind=GrammarKind.CHOICE, text=json.dumps(choices)),
    "grammar": lambda grammar: Grammar(kind=GrammarKind.LARK, text=grammar),
}


def _schema(schema: str | dict[str, Any] | bool) -> Grammar:
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=schema if isinstance(schema, str) else json.dumps(schema))
