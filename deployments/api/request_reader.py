"""Reads HTTP requests and prepares them for the engines."""

import logging
from collections.abc import Callable
from typing import TypeVar

from starlette.requests import Request

from deployments.api.answer_headers import IGNORED_HEADER, add_header
from deployments.api.anthropic.schemas import MessagesRequest
from deployments.api.bodies import Body, parse, read_body
from deployments.api.callers import caller_of
from deployments.api.errors import model_not_found
from deployments.api.openai.response_requests import ResponsesRequest
from deployments.api.sse import until_disconnect
from deployments.chat.encoder import EncodedChat, PromptEncoder
from deployments.chat.errors import in_words_of
from deployments.chat.ignored import header_value
from deployments.chat.requests import ChatRequest
from deployments.chat.service import INLINE_BYTES, ChatService
from deployments.chat.turn import Turn
from deployments.router.router import Router

logger = logging.getLogger("ray.serve")

T = TypeVar("T")


class RequestReader:
    """Reads requests, and starts to answer those that are chats.

    Args:
        router: knows the limits, and the engines.
        chats: prepares and begins chats.
    """

    def __init__(self, router: Router, chats: ChatService) -> None:
        self._router = router
        self._chats = chats
        self._model = router.config.model_name

    async def body(self, request: Request, model: type[Body]) -> tuple[Body, int]:
        """The request's validated body, and its size in bytes.

        Raises:
            APIError: something is wrong with the body.
        """
        data = await read_body(request, self._router.config.limits)
        is_strict = self._router.config.strict_fields
        body, ignored = await self._chats.run(len(data), lambda: parse(model, data, is_strict=is_strict))
        if ignored:
            add_header(request.scope, IGNORED_HEADER, header_value(ignored))
            logger.debug("fields ignored: %s", header_value(ignored))
        self.check_model(body.model or self._model)
        return body, len(data)

    async def prepared(self, request: Request, body: Body, size: int, prepare: Callable[[PromptEncoder, Body], T]) -> T:
        """Prepare a body for the engines, in a thread if that takes long.

        It waits until an engine has reported its limits, against which requests are checked; a fleet at zero starts
        one.

        Raises:
            APIError, LLMError: something is wrong with the request; or see `Router.engine_info`.
        """
        if not self._router.is_ready:
            await self._router.engine_info(caller_of(request).timeout_s)
        encoder = self._chats.encoder
        size = max(size, INLINE_BYTES + 1) if body.takes_long else size
        return await self._chats.run(size, lambda: prepare(encoder, body))

    async def prepared_at_once(
        self, request: Request, model: type[Body], prepare: Callable[[PromptEncoder, Body], T]
    ) -> T:
        """Like `prepared`, for a request whose answer is the prepared value itself."""
        body, size = await self.body(request, model)
        return await until_disconnect(request.receive, self.prepared(request, body, size, prepare))

    async def turn(self, request: Request, body: ResponsesRequest | MessagesRequest, size: int) -> Turn:
        """Begin to answer a chat that is written in another API's format."""

        def encode(encoder: PromptEncoder, body: ResponsesRequest | MessagesRequest) -> tuple[EncodedChat, ChatRequest]:
            with in_words_of(body.FIELDS):
                chat = body.to_chat()
                return encoder.chat(chat), chat

        encoded, chat = await self.prepared(request, body, size, encode)
        return await self._chats.chat(encoded, chat.stop_strings(), caller_of(request, chat.priority))

    def check_model(self, name: str) -> None:
        """Refuse a request that names another model.

        Raises:
            APIError: a 404.
        """
        if name != self._model:
            raise model_not_found(name)
