"""The HTTP API over a router: which path does what, and how it is described in `/docs`."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from deployments.api.answer_headers import IGNORED_HEADER, add_header
from deployments.api.answering import AnswerWriter, answer, json_response
from deployments.api.anthropic.message_writer import MessageWriter, message_failure
from deployments.api.anthropic.schemas import CountTokensRequest, MessagesRequest
from deployments.api.auth import KeyGuard
from deployments.api.bodies import Body, parse, read_body
from deployments.api.callers import caller_of
from deployments.api.edge import Edge
from deployments.api.errors import answer_to, model_not_found, unknown_route, wrong_method
from deployments.api.json_parts import JSONResponse, json_pieces
from deployments.api.openai.completion_writer import CompletionWriter
from deployments.api.openai.embeddings import EmbeddingsRequest, embeddings_object
from deployments.api.openai.response_requests import ResponsesRequest, echoed
from deployments.api.openai.response_writer import ResponseWriter, response_failure
from deployments.api.openai.responses import (
    ChatCompletion,
    Completion,
    EmbeddingList,
    InputTokens,
    MessageObject,
    ModelList,
    ModelObject,
    ResponseObject,
    Stats,
    Status,
    Text,
    Tokens,
    Version,
)
from deployments.api.pages import page
from deployments.api.route_table import Route, describe
from deployments.api.sse import EventStream, error_events, event, until_disconnect
from deployments.api.tracing import TraceRequests
from deployments.chat.encoder import EncodedChat, PromptEncoder
from deployments.chat.errors import APIError, in_words_of, not_ready, of_engine
from deployments.chat.ignored import header_value
from deployments.chat.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from deployments.chat.service import INLINE_BYTES, ChatService
from deployments.chat.turn import Turn
from deployments.errors import NoReplicaError
from deployments.observe.exposition import CONTENT_TYPE
from deployments.router.router import Router
from deployments.version import __version__
from llm.errors import LLMError

logger = logging.getLogger("ray.serve")

TITLE = "Rayline"
T = TypeVar("T")
_EVENT_INTERVAL_S = 0.5


def create_api(router: Router) -> FastAPI:
    """The HTTP application of a router, whose keys it asks for.

    Raises:
        CheckpointError, ConfigError: the tokenizer cannot be loaded; one line with the fix.
    """
    config = router.config
    table = Endpoints(router).table()
    api = FastAPI(title=TITLE, version=__version__, redirect_slashes=False, redoc_url=None)
    for route in table:
        api.add_api_route(
            route.path, route.handler, methods=[route.method], summary=route.summary, response_model=None,
            description=route.handler.__doc__, openapi_extra=route.operation(), response_class=Response,
        )  # fmt: skip
    api.openapi = lambda: describe(api, table)  # type: ignore[method-assign]
    api.add_exception_handler(APIError, _on_api_error)
    api.add_exception_handler(LLMError, _on_llm_error)
    api.add_exception_handler(HTTPException, _on_http_error)
    # The last one added is the outermost.
    api.add_middleware(
        KeyGuard,
        access=router.access,
        open_paths=[route.path for route in table if route.is_open],
        metered_paths=[route.path for route in table if route.path.startswith("/v1/")],
    )
    api.add_middleware(Edge, limits=config.limits, max_open_requests=config.router.max_ongoing_requests)
    if router.tracer is not None:
        api.add_middleware(TraceRequests, tracer=router.tracer)
    return api


class Endpoints:
    """What each route does.

    Args:
        router: what generates.

    Raises:
        CheckpointError, ConfigError: the tokenizer cannot be loaded; one line with the fix.
    """

    def __init__(self, router: Router) -> None:
        self._router = router
        self._chats = ChatService(router)
        self._model = router.config.model_name
        self._limits = router.config.limits

    def table(self) -> list[Route]:
        """Every route there is."""
        return [
            Route("POST", "/v1/chat/completions", self.chat, "Chat completion", ChatCompletion, ChatRequest),
            Route("POST", "/v1/completions", self.completion, "Completion", Completion, CompletionRequest),
            Route("POST", "/v1/responses", self.response, "Response", ResponseObject, ResponsesRequest),
            Route(
                "POST",
                "/v1/messages",
                self.message,
                "Message, as Anthropic's API has it",
                MessageObject,
                MessagesRequest,
            ),
            Route(
                "POST",
                "/v1/messages/count_tokens",
                self.count_tokens,
                "Tokens of a message",
                InputTokens,
                CountTokensRequest,
            ),
            Route("POST", "/v1/embeddings", self.embeddings, "Vectors of texts", EmbeddingList, EmbeddingsRequest),
            Route("GET", "/v1/models", self.models, "Models", ModelList),
            Route("GET", "/v1/models/{model:path}", self.model, "One model", ModelObject),
            Route("POST", "/tokenize", self.tokenize, "Text or chat to tokens", Tokens, TokenizeRequest),
            Route("POST", "/detokenize", self.detokenize, "Tokens to text", Text, DetokenizeRequest),
            Route("GET", "/health", self.health, "Whether this router runs", Status, is_open=True),
            Route("GET", "/ready", self.ready, "Whether requests can be answered", Status, is_open=True),
            Route("GET", "/version", self.version, "Version of the server", Version),
            Route("GET", "/metrics", self.metrics, "Metrics for Prometheus", "text/plain"),
            Route("GET", "/", self.chat_page, "The chat page", "text/html", is_open=True),
            Route("GET", "/fleet", self.fleet_page, "The fleet page", "text/html", is_open=True),
            Route(
                "GET",
                "/rayline/events",
                self.events,
                "State of router and replicas, twice a second",
                "text/event-stream",
            ),
            Route("GET", "/rayline/stats", self.stats, "State of this router and of the replicas", Stats),
        ]

    async def chat(self, request: Request) -> Response:
        """Answer a chat, whole or as server-sent events."""
        body, size = await self._body(request, ChatRequest)

        async def start() -> tuple[Turn, AnswerWriter]:
            chat = await self._prepared(request, body, size, PromptEncoder.chat)
            turn = await self._chats.chat(chat, body.stop_strings(), caller_of(request, body.priority))
            return turn, self._completion_writer(turn, body, is_chat=True, wants_logprobs=bool(body.logprobs))

        return await answer(request, start(), error_events, is_streamed=bool(body.stream))

    async def completion(self, request: Request) -> Response:
        """Continue a prompt, or several, whole or as server-sent events."""
        body, size = await self._body(request, CompletionRequest)

        async def start() -> tuple[Turn, AnswerWriter]:
            completion = await self._prepared(request, body, size, PromptEncoder.completion)
            turn = await self._chats.completion(completion, body.stop_strings(), caller_of(request, body.priority))
            return turn, self._completion_writer(
                turn,
                body,
                is_chat=False,
                wants_logprobs=body.logprobs is not None,
                num_kept=body.n or 1,
                echoes=bool(body.echo),
                wants_prompt=body.prompt_logprobs is not None,
            )

        return await answer(request, start(), error_events, is_streamed=bool(body.stream))

    async def response(self, request: Request) -> Response:
        """Answer a conversation as OpenAI's Responses API does, whole or as server-sent events. Nothing is stored."""
        body, size = await self._body(request, ResponsesRequest)

        async def start() -> tuple[Turn, AnswerWriter]:
            turn = await self._turn(request, body, size)
            fields = await self._chats.run(size, lambda: echoed(body))
            return turn, ResponseWriter(turn, model=self._model, echoed=fields)

        return await answer(request, start(), response_failure, is_streamed=bool(body.stream))

    async def message(self, request: Request) -> Response:
        """Answer a conversation as Anthropic's Messages API does, whole or as server-sent events."""
        body, size = await self._body(request, MessagesRequest)

        async def start() -> tuple[Turn, AnswerWriter]:
            turn = await self._turn(request, body, size)
            return turn, MessageWriter(turn, model=self._model)

        return await answer(request, start(), message_failure, is_streamed=bool(body.stream))

    async def count_tokens(self, request: Request) -> Response:
        """Count the tokens that a message's prompt would have."""

        def count(encoder: PromptEncoder, body: CountTokensRequest) -> int:
            with in_words_of(body.FIELDS):
                return len(encoder.prompt_ids(body.to_chat()))

        return json_response({"input_tokens": await self._prepared_at_once(request, CountTokensRequest, count)})

    async def _body(self, request: Request, model: type[Body]) -> tuple[Body, int]:
        """The request's body, checked, and its size in bytes.

        Raises:
            APIError: what is wrong with it.
        """
        data = await read_body(request, self._limits)
        is_strict = self._router.config.strict_fields
        body, ignored = await self._chats.run(len(data), lambda: parse(model, data, is_strict=is_strict))
        if ignored:
            add_header(request.scope, IGNORED_HEADER, header_value(ignored))
            logger.debug("fields ignored: %s", header_value(ignored))
        self._check_model(body.model or self._model)
        return body, len(data)

    async def _prepared(
        self, request: Request, body: Body, size: int, prepare: Callable[[PromptEncoder, Body], T]
    ) -> T:
        """What is made of a body before the engines get it, in a thread if that is long.

        It waits until an engine has told its limits, by which requests are checked; a fleet at zero starts one.

        Raises:
            APIError, LLMError: what is wrong with the request; or see `Router.engine_info`.
        """
        if not self._router.is_ready:
            await self._router.engine_info(caller_of(request).timeout_s)
        encoder = self._chats.encoder
        size = max(size, INLINE_BYTES + 1) if body.takes_long else size
        return await self._chats.run(size, lambda: prepare(encoder, body))

    async def _prepared_at_once(
        self, request: Request, model: type[Body], prepare: Callable[[PromptEncoder, Body], T]
    ) -> T:
        """As `_prepared`, of a request that is answered with it."""
        body, size = await self._body(request, model)
        return await until_disconnect(request.receive, self._prepared(request, body, size, prepare))

    async def _turn(self, request: Request, body: ResponsesRequest | MessagesRequest, size: int) -> Turn:
        """Begin to answer what is a chat in another API's words."""

        def encode(encoder: PromptEncoder, body: ResponsesRequest | MessagesRequest) -> tuple[EncodedChat, ChatRequest]:
            with in_words_of(body.FIELDS):
                chat = body.to_chat()
                return encoder.chat(chat), chat

        encoded, chat = await self._prepared(request, body, size, encode)
        return await self._chats.chat(encoded, chat.stop_strings(), caller_of(request, chat.priority))

    def _completion_writer(self, turn: Turn, body: ChatRequest | CompletionRequest, **options: Any) -> CompletionWriter:
        include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        tokenizer = self._chats.tokenizer
        return CompletionWriter(turn, tokenizer, model=self._model, include_usage=include_usage, **options)

    async def embeddings(self, request: Request) -> Response:
        """Give the vector of each input: hidden states of the model, pooled, of length 1."""
        body, size = await self._body(request, EmbeddingsRequest)

        async def embed() -> tuple[list[list[int]], list[bytes]]:
            inputs = await self._prepared(request, body, size, lambda encoder, body: encoder.inputs(body.inputs()))
            caller = caller_of(request, body.priority)
            return inputs, await self._router.embed(inputs, body.pooling or "last", caller)

        inputs, vectors = await until_disconnect(request.receive, embed())
        num_tokens = sum(map(len, inputs))
        write = lambda: json_pieces(embeddings_object(body, self._model, vectors, num_tokens))  # noqa: E731
        return JSONResponse(await asyncio.to_thread(write))

    async def models(self, _: Request) -> Response:
        """List the served model."""
        return json_response({"object": "list", "data": [self._model_object()]})

    async def model(self, request: Request) -> Response:
        """Describe the served model."""
        self._check_model(request.path_params["model"])
        return json_response(self._model_object())

    async def tokenize(self, request: Request) -> Response:
        """Turn a text or a chat into token ids."""
        return JSONResponse(await self._prepared_at_once(request, TokenizeRequest, _tokens))

    async def detokenize(self, request: Request) -> Response:
        """Turn token ids into text."""
        return JSONResponse(await self._prepared_at_once(request, DetokenizeRequest, _text))

    async def health(self, _: Request) -> Response:
        """Answer as long as this process runs."""
        return json_response({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Answer 200 while requests are answered: a replica serves, or one starts when a request comes. Else 503."""
        if not self._router.can_answer:
            missing = of_engine(NoReplicaError("No engine replica serves at the moment"))
            raise missing if self._router.is_ready else not_ready()
        return json_response({"status": "ready"})

    async def version(self, _: Request) -> Response:
        """Tell the server's version."""
        return json_response({"version": __version__})

    async def stats(self, _: Request) -> Response:
        """Tell what runs and how full the engines are, as this router last heard."""
        return json_response(self._router.snapshot())

    async def metrics(self, _: Request) -> Response:
        """Give the metrics of all routers and replicas, whichever router is asked, in Prometheus' text format."""
        return Response(await self._router.metrics.text(), media_type=CONTENT_TYPE)

    async def chat_page(self, _: Request) -> Response:
        """Give the chat page."""
        return page("chat")

    async def fleet_page(self, _: Request) -> Response:
        """Give the fleet page."""
        return page("fleet")

    async def events(self, _: Request) -> Response:
        """Tell what runs and what happened, as server-sent events, until the client leaves."""
        return EventStream(self._watch_fleet(), error_events)

    async def _watch_fleet(self) -> AsyncGenerator[bytes, None]:
        while not self._router.is_shutting_down:
            yield event(self._router.fleet_event())
            await asyncio.sleep(_EVENT_INTERVAL_S)

    def _check_model(self, name: str) -> None:
        if name != self._model:
            raise model_not_found(name)

    def _model_object(self) -> dict[str, Any]:
        info = self._router.info
        return {
            "id": self._model,
            "object": "model",
            "created": self._router.started_at,
            "owned_by": "rayline",
            "max_model_len": info.max_seq_len if info is not None else None,
        }


def _tokens(encoder: PromptEncoder, body: TokenizeRequest) -> list[bytes]:
    """The answer of `/tokenize`."""
    if body.messages is not None:
        generation_prompt = body.add_generation_prompt is not False
        ids = encoder.chat_ids(body.messages, add_generation_prompt=generation_prompt, variables={})
    else:
        ids = encoder.text_ids(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
    texts = [encoder.tokenizer.token_text(token_id) for token_id in ids] if body.return_token_strs else None
    found = {"count": len(ids), "max_model_len": encoder.info.max_seq_len, "tokens": ids, "token_strs": texts}
    return json_pieces(found)


def _text(encoder: PromptEncoder, body: DetokenizeRequest) -> list[bytes]:
    """The answer of `/detokenize`."""
    encoder.check_ids(body.tokens, "tokens")
    return json_pieces({"prompt": encoder.tokenizer.decode(body.tokens)})


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError), "registered for it"
    return answer_to(request.scope, error)


async def _on_llm_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LLMError), "registered for it"
    return answer_to(request.scope, of_engine(error))


async def _on_http_error(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses."""
    assert isinstance(error, HTTPException), "registered for it"
    known = {404: unknown_route(), 405: wrong_method(error.headers)}
    other = APIError(error.status_code, str(error.detail), headers=error.headers)
    return answer_to(request.scope, known.get(error.status_code, other))
