"""The handlers for the paths by which administrators load and unload adapters, as vLLM has them."""

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from deployments.adapters.messages import LoadOrder, OrderRefusal
from deployments.api.administration import require_administrator
from deployments.api.request_reader import RequestReader
from deployments.api.route_table import Route
from deployments.chat.errors import SERVER_ERROR, APIError, invalid
from deployments.chat.wire_model import NoEffect, RequestBody
from deployments.router.directory import ModelDirectory

_TEXT = "text/plain"


class LoadAdapterRequest(RequestBody):
    """Body of `POST /v1/load_lora_adapter`."""

    model: str | None = None
    """Extension. The model that the adapter is for; the only one that takes adapters if it is left out."""
    lora_name: str
    """The name by which requests will choose the adapter, as their `model`."""
    lora_path: str
    """Directory of the adapter, within one of the setting `adapter_roots`."""
    load_inplace: bool | None = None
    """Whether it may take the place of an adapter of this name that was loaded by request."""
    is_3d_lora_weight: NoEffect = None
    """Ignored: the weights say it."""


class UnloadAdapterRequest(RequestBody):
    """Body of `POST /v1/unload_lora_adapter`."""

    lora_name: str
    """The adapter's name."""
    lora_int_id: NoEffect = None
    """Ignored: adapters have no numbers here."""


class AdapterEndpoints:
    """Takes administrators' orders.

    Args:
        directory: the models, and the adapters that requests may name.
        requests: reads the orders.
    """

    def __init__(self, directory: ModelDirectory, requests: RequestReader) -> None:
        self._directory = directory
        self._adapters = directory.adapters
        self._requests = requests

    def table(self) -> list[Route]:
        """The routes of this class."""
        return [
            Route("POST", "/v1/load_lora_adapter", self.load, "Load an adapter", _TEXT, LoadAdapterRequest),
            Route("POST", "/v1/unload_lora_adapter", self.unload, "Unload an adapter", _TEXT, UnloadAdapterRequest),
        ]

    async def load(self, request: Request) -> Response:
        """Let requests choose another adapter, for administrators. It is checked first; engines read it when the first
        request needs it."""
        require_administrator(request, self._directory)
        body, _ = await self._requests.body(request, LoadAdapterRequest)
        self._check_takes_adapters()
        model = body.model
        if model is not None and (routers := self._directory.find(model)):
            model = routers[0].config.model_name
        order = LoadOrder(body.lora_name, body.lora_path, model, bool(body.load_inplace))
        refusal = await self._adapters.load(order)
        if refusal is not None:
            raise _error_of(refusal)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """Let requests no longer choose an adapter that was loaded by request, for administrators. Requests that run
        are not affected."""
        require_administrator(request, self._directory)
        body, _ = await self._requests.body(request, UnloadAdapterRequest)
        self._check_takes_adapters()
        refusal = await self._adapters.unload(body.lora_name)
        if refusal is not None:
            raise _error_of(refusal)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    def _check_takes_adapters(self) -> None:
        if not self._adapters.takes_orders:
            raise invalid(
                "No model takes adapters: set engine.max_adapters, and adapter_roots to the directories that hold them"
            )


def _error_of(refusal: OrderRefusal) -> APIError:
    if refusal.is_early:
        headers = {"Retry-After": "3"}
        return APIError(503, refusal.message, type=SERVER_ERROR, code="adapters_loading", headers=headers)
    if refusal.is_unknown:
        return APIError(404, refusal.message, param=refusal.param, code="adapter_not_found")
    return invalid(refusal.message, refusal.param)
