"""The handlers for the paths that say which models there are, and whether they answer."""

from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from deployments.adapters.messages import KnownAdapter
from deployments.api.answering import json_response
from deployments.api.batch_desk import list_object
from deployments.api.errors import model_not_found
from deployments.api.openai.responses import ModelList, ModelObject, Status
from deployments.api.permissions import may_use
from deployments.api.route_table import Route
from deployments.chat.errors import not_ready, of_engine
from deployments.errors import NoReplicaError
from deployments.router.directory import ModelDirectory
from deployments.router.model_state import ModelState
from deployments.router.router import Router


class ModelEndpoints:
    """Answers requests about the models.

    Args:
        directory: the models.
    """

    def __init__(self, directory: ModelDirectory) -> None:
        self._directory = directory

    def table(self) -> list[Route]:
        """The routes of this class."""
        return [
            Route("GET", "/v1/models", self.models, "Models", ModelList),
            Route("GET", "/v1/models/{model:path}", self.model, "One model", ModelObject),
            Route("GET", "/ready", self.ready, "Whether requests can be answered", Status, is_open=True),
        ]

    async def models(self, request: Request) -> Response:
        """List the models and then the adapters that the API key may use, with their aliases and states."""
        found = [self._describe(self._directory.find(name)) for name in self._names_for(request)]
        known = [adapters for adapters in self._directory.adapters.all() if may_use(request, adapters[0].name)]
        data = [*found, *map(self._describe_adapter, known)]
        return json_response(list_object(data, has_more=False))

    async def model(self, request: Request) -> Response:
        """Describe one model, by its name or an alias, or one adapter."""
        name = request.path_params["model"]
        if not self._directory.find(name) and may_use(request, name):
            adapters = await self._directory.adapters.find_anew(name)
            if adapters:
                return json_response(self._describe_adapter(adapters))
        return json_response(self._describe(self._find(request, name)))

    async def ready(self, request: Request) -> Response:
        """Answer 200 while requests for any model can be answered: a replica serves, or one starts when a request
        arrives. Otherwise 503. With `?model=NAME`, only that model counts."""
        name = request.query_params.get("model") or None
        # This needs no key, so it names no model.
        routers = self._directory.routers if name is None else self._directory.find(name)
        if not routers:
            raise model_not_found(name or "")
        if not any(router.can_answer for router in routers):
            missing = of_engine(NoReplicaError("No engine replica serves at the moment"))
            raise missing if any(router.is_ready for router in routers) else not_ready()
        return json_response({"status": "ready"})

    def _names_for(self, request: Request) -> list[str]:
        """The names of the models that the request's API key may use."""
        return [name for name in self._directory.names if may_use(request, *self._directory.names_of(name))]

    def _find(self, request: Request, name: str) -> tuple[Router, ...]:
        found = self._directory.find(name)
        if not found or not may_use(request, *self._directory.names_of(name)):
            raise model_not_found(name, self._names_for(request))
        return found

    def _describe(self, routers: tuple[Router, ...]) -> dict[str, Any]:
        """The entries of one name, as one model."""
        states = {router.state for router in routers}
        infos = [router.info for router in routers if router.info is not None]
        context = min((info.max_seq_len for info in infos), default=None)
        return {
            **_names(routers[0].config.model_name, self._directory.started_at),
            "owned_by": "rayline",
            "root": routers[0].config.model,
            "parent": None,
            "max_model_len": context,
            "max_input_tokens": context,
            "aliases": list(dict.fromkeys(alias for router in routers for alias in router.config.aliases)),
            "state": next(state for state in ModelState if state in states),
            "task": ("classify" if infos[0].num_labels else "generate") if infos else None,
        }

    def _describe_adapter(self, adapters: tuple[KnownAdapter, ...]) -> dict[str, Any]:
        """An adapter, in the form of the model that it belongs to."""
        keys = {adapter.key for adapter in adapters}
        routers = tuple(router for router in self._directory.routers if router.key in keys)
        model = self._describe(routers)
        changes = {**_names(adapters[0].name, adapters[0].created), "aliases": []}
        return {**model, **changes, "root": adapters[0].path, "parent": model["id"]}


def _names(name: str, created: int) -> dict[str, Any]:
    """What a model is called and when it came, in the words of OpenAI's API and of Anthropic's."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(created, UTC).isoformat(),
    }
