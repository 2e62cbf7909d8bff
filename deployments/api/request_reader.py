"""Reads HTTP requests, finds the models that they are for, and prepares them for the engines."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import Request

from deployments.api.answer_headers import IGNORED_HEADER, add_header
from deployments.api.anthropic.schemas import MessagesRequest
from deployments.api.bodies import Body, parse, read_body
from deployments.api.callers import caller_of, sheet_of, version_key_of
from deployments.api.errors import adapters_loading, model_not_found
from deployments.api.openai.response_requests import ResponsesRequest
from deployments.api.permissions import may_use
from deployments.api.sse import until_disconnect
from deployments.chat.encoder import EncodedChat, PromptEncoder
from deployments.chat.errors import in_words_of, invalid
from deployments.chat.ignored import header_value
from deployments.chat.requests import ChatRequest
from deployments.chat.service import ChatService
from deployments.chat.threads import INLINE_BYTES, TokenizerThreads
from deployments.chat.turn import Turn
from deployments.router.directory import ModelDirectory
from deployments.router.router import Router
from llm.serving.schemas import AdapterRef

logger = logging.getLogger("ray.serve")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """What answers a request.

    Attributes:
        chats: prepares and begins the answers of the model that the request is for.
        name: the name of the model or the adapter, for the answer.
        mark: what ids end with that tell which entry of the name made something; empty if there is only one.
        adapter: the adapter that the request chooses; None for the model itself.
    """

    chats: ChatService
    name: str
    mark: str = ""
    adapter: AdapterRef | None = None

    @property
    def router(self) -> Router:
        """The model's router."""
        return self.chats.router


class RequestReader:
    """Reads requests, says which model each is for, and starts to answer those that are chats.

    Args:
        directory: the models.

    Raises:
        CheckpointError, ConfigError: a tokenizer cannot be loaded; one line with the fix.
    """

    def __init__(self, directory: ModelDirectory) -> None:
        self._directory = directory
        self._platform = directory.platform
        self.threads = TokenizerThreads(self._platform.router.tokenizer_threads)
        self._chats = {router.key: ChatService(router) for router in directory.routers}

    async def body(self, request: Request, model: type[Body]) -> tuple[Body, int]:
        """The request's validated body, and its size in bytes.

        Raises:
            APIError: something is wrong with the body.
        """
        data = await read_body(request, self._platform.limits)
        is_strict = self._platform.strict_fields
        body, ignored = await self.threads.run(len(data), lambda: parse(model, data, is_strict=is_strict))
        if ignored:
            add_header(request.scope, IGNORED_HEADER, header_value(ignored))
            logger.debug("fields ignored: %s", header_value(ignored))
        if body.model and not self._directory.find(body.model):
            await self._directory.adapters.find_anew(body.model)  # another router may have loaded it a moment ago
        return body, len(data)

    def target(self, request: Request, body: Body) -> Target:
        """What answers a request with this body, by its `model`, which may be an adapter; without one, the only model.

        Raises:
            APIError: a 404, there is no such model, or the API key may not use it; a 400, there are several and the
                body names none; a 503, adapters are still being read.
        """
        names = [name for name in self._directory.names if may_use(request, *self._directory.names_of(name))]
        if not body.model and len(names) > 1:
            raise invalid(f"model: name one of {', '.join(names)}", "model")
        name = body.model or next(iter(names), "")
        continued = getattr(body, "previous_response_id", None) or ""
        router = self._directory.pick(name, version_key_of(request, body), continued)
        if router is None and not self._directory.adapters.is_settled:
            raise adapters_loading(name)
        if router is None or not may_use(request, *(self._directory.names_of(name) or (name,))):
            raise model_not_found(name, names)
        adapter = self._directory.adapter(name, router)
        served = adapter.name if adapter is not None else router.config.model_name
        sheet_of(request.scope).model = served
        return Target(self._chats[router.key], served, self._directory.mark(router), adapter)

    async def prepared(
        self, request: Request, target: Target, body: Body, size: int, prepare: Callable[[PromptEncoder, Body], T]
    ) -> T:
        """Prepare a body for the engines, in a thread if that takes long.

        It waits until an engine has reported its limits, against which requests are checked; a fleet at zero starts
        one.

        Raises:
            APIError, LLMError: something is wrong with the request; or see `Router.engine_info`.
        """
        if not target.router.is_ready:
            await target.router.engine_info(caller_of(request).timeout_s)
        encoder = target.chats.encoder
        size = max(size, INLINE_BYTES + 1) if body.takes_long else size
        return await self.threads.run(size, lambda: prepare(encoder, body))

    async def prepared_at_once(
        self, request: Request, model: type[Body], prepare: Callable[[PromptEncoder, Body], T]
    ) -> T:
        """Like `prepared`, for a request whose answer is the prepared value itself."""
        body, size = await self.body(request, model)
        target = self.target(request, body)
        return await until_disconnect(request.receive, self.prepared(request, target, body, size, prepare))

    async def turn(self, request: Request, target: Target, body: ResponsesRequest | MessagesRequest, size: int) -> Turn:
        """Begin to answer a chat that is written in another API's format."""

        def encode(encoder: PromptEncoder, body: ResponsesRequest | MessagesRequest) -> tuple[EncodedChat, ChatRequest]:
            with in_words_of(body.FIELDS):
                chat = body.to_chat()
                return encoder.chat(chat), chat

        encoded, chat = await self.prepared(request, target, body, size, encode)
        caller = caller_of(request, chat.priority, chat.prompt_cache_key)
        return await target.chats.chat(encoded, chat.stop_strings(), caller, target.adapter)
