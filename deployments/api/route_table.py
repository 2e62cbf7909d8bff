"""The route table: how each path is answered, and how `/docs` describes it."""

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from deployments.api.errors import ErrorResponse
from deployments.api.openai.responses import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    MessageObject,
    ResponseObject,
)

Handler = Callable[[Request], Awaitable[Response]]

EVENT_STREAM = "text/event-stream"
_METERED = ("/rerank", "/score", "/classify", "/pooling")
"""Paths outside `/v1` at which a model is asked."""
_EVENT = {"type": "string", "description": "Server-sent events"}


@dataclass(frozen=True, slots=True)
class Route:
    """One line of the route table."""

    method: str
    path: str
    handler: Handler
    summary: str
    answer: type[BaseModel] | str
    """A JSON object, or another media type."""
    body: type[BaseModel] | None = None
    body_type: str = "application/json"
    is_open: bool = False
    """Answered without a key even if keys are required."""

    @property
    def is_metered(self) -> bool:
        """Whether its requests count toward their key's limits."""
        return self.path.startswith(("/v1/", "/v2/")) or self.path in _METERED

    def operation(self) -> dict[str, Any]:
        """The route's entry in the description, needed because handlers read and write their bodies themselves."""
        if isinstance(self.answer, str):
            contents: dict[str, Any] = {self.answer: {"schema": {"type": "string"}}}
        else:
            contents = {"application/json": {"schema": _ref(self.answer)}}
            if self.answer in _STREAMED:
                event = _STREAMED[self.answer]
                contents[EVENT_STREAM] = {"schema": _EVENT if event is None else _ref(event)}
        error = {"description": "Error", "content": {"application/json": {"schema": _ref(ErrorResponse)}}}
        operation: dict[str, Any] = {
            "responses": {"200": {"description": "Success", "content": contents}, "4XX": error, "5XX": error}
        }
        if self.body is not None:
            operation["requestBody"] = {"required": True, "content": {self.body_type: {"schema": _ref(self.body)}}}
        names = re.findall(r"{(\w+)", self.path)
        if names:
            operation["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
            ]
        return operation


_STREAMED: dict[type[BaseModel], type[BaseModel] | None] = {
    ChatCompletion: ChatCompletionChunk,
    Completion: Completion,
    ResponseObject: None,
    MessageObject: None,
}


_SECURITY = {"type": "http", "scheme": "bearer", "description": "An API key"}


def describe(api: FastAPI, table: Sequence[Route], *, needs_key: bool = False) -> dict[str, Any]:
    """The API's description, made once, including the bodies that handlers read and write themselves.

    Args:
        api: has the routes.
        table: the routes.
        needs_key: whether routes that are not open require a key.
    """
    if api.openapi_schema is None:
        schema = get_openapi(title=api.title, version=api.version, routes=api.routes)
        models: list[type[BaseModel]] = [ErrorResponse, ChatCompletionChunk]
        for route in table:
            models += [model for model in (route.body, route.answer) if isinstance(model, type)]
        _, definitions = models_json_schema(
            [(model, "validation") for model in dict.fromkeys(models)],
            ref_template="#/components/schemas/{model}",
        )
        components = schema.setdefault("components", {})
        components.setdefault("schemas", {}).update(definitions["$defs"])
        if needs_key:
            components["securitySchemes"] = {"key": _SECURITY}
            for route in table:
                if not route.is_open:
                    schema["paths"][route.path.replace(":path", "")][route.method.lower()]["security"] = [{"key": []}]
        api.openapi_schema = schema
    return api.openapi_schema


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}
