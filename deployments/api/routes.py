"""The HTTP API of a router: what each path does."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from deployments.api.adapter_routes import AdapterEndpoints
from deployments.api.answering import AnswerWriter, answer, json_response
from deployments.api.anthropic.message_writer import MessageWriter, message_failure
from deployments.api.anthropic.schemas import CountTokensRequest, MessagesRequest
from deployments.api.batch_routes import BatchEndpoints
from deployments.api.callers import caller_of
from deployments.api.file_routes import FileEndpoints
from deployments.api.fleet_stream import watch_fleet
from deployments.api.json_parts import JSONResponse, json_pieces
from deployments.api.model_routes import ModelEndpoints
from deployments.api.openai.completion_writer import CompletionWriter
from deployments.api.openai.response_store import ResponseStore
from deployments.api.openai.responses import (
    ChatCompletion,
    Completion,
    InputTokens,
    MessageObject,
    Stats,
    Status,
    Text,
    Tokens,
    Version,
)
from deployments.api.overview_routes import OverviewEndpoints
from deployments.api.pages import page
from deployments.api.permissions import is_admin
from deployments.api.request_reader import RequestReader, Target
from deployments.api.response_routes import ResponseEndpoints
from deployments.api.route_table import EVENT_STREAM, Route
from deployments.api.sse import EventStream, error_events
from deployments.api.usage_routes import UsageEndpoints
from deployments.api.vector_routes import VectorEndpoints
from deployments.batches.desk import BatchDesk
from deployments.chat.encoder import PromptEncoder
from deployments.chat.errors import in_words_of
from deployments.chat.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from deployments.chat.turn import Turn
from deployments.observe.exposition import CONTENT_TYPE
from deployments.router.directory import ModelDirectory
from deployments.version import __version__


class Endpoints:
    """What each route does.

    Args:
        directory: the models, which generate the answers.
        store: where responses are kept; None for nowhere.
        desk: where files and batches are kept; None for nowhere.

    Raises:
        CheckpointError, ConfigError: a tokenizer cannot be loaded; one line with the fix.
    """

    def __init__(
        self, directory: ModelDirectory, store: ResponseStore | None = None, desk: BatchDesk | None = None
    ) -> None:
        self._desk = desk
        self._directory = directory
        self._requests = RequestReader(directory)
        self._responses = ResponseEndpoints(self._requests, store)
        self._vectors = VectorEndpoints(self._requests)
        self._models = ModelEndpoints(directory)
        self._usage = UsageEndpoints(directory.access, directory.model_name)
        self._adapters = AdapterEndpoints(directory, self._requests)
        self._overview = OverviewEndpoints(directory, desk)

    def table(self) -> list[Route]:
        """Every route there is."""
        routes = self._routes_of_requests()
        limits = self._directory.platform.limits
        batches = BatchEndpoints(self._desk, limits, [route.path for route in routes])
        files = FileEndpoints(self._desk, limits)
        return [*routes, *files.table(), *batches.table(), *self._overview.table()]

    def _routes_of_requests(self) -> list[Route]:
        return [
            Route("POST", "/v1/chat/completions", self.chat, "Chat completion", ChatCompletion, ChatRequest),
            Route("POST", "/v1/completions", self.completion, "Completion", Completion, CompletionRequest),
            *self._responses.table(),
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
            *self._vectors.table(),
            *self._models.table(),
            *self._usage.table(),
            *self._adapters.table(),
            Route("POST", "/tokenize", self.tokenize, "Text or chat to tokens", Tokens, TokenizeRequest),
            Route("POST", "/detokenize", self.detokenize, "Tokens to text", Text, DetokenizeRequest),
            Route("GET", "/health", self.health, "Whether this router runs", Status, is_open=True),
            Route("GET", "/version", self.version, "Version of the server", Version),
            Route("GET", "/metrics", self.metrics, "Metrics for Prometheus", "text/plain"),
            Route("GET", "/", self.chat_page, "The chat page", "text/html", is_open=True),
            Route("GET", "/fleet", self.fleet_page, "The fleet page", "text/html", is_open=True),
            Route("GET", "/docs", self.docs_page, "The description of this API", "text/html", is_open=True),
            Route(
                "GET",
                "/rayline/events",
                self.events,
                "State of router and replicas, twice a second",
                EVENT_STREAM,
            ),
            Route("GET", "/rayline/stats", self.stats, "State of this router and of the replicas", Stats),
        ]

    async def chat(self, request: Request) -> Response:
        """Answer a chat, whole or as server-sent events."""
        body, size = await self._requests.body(request, ChatRequest)
        target = self._requests.target(request, body)

        async def start() -> tuple[Turn, AnswerWriter]:
            chat = await self._requests.prepared(request, target, body, size, PromptEncoder.chat)
            caller = caller_of(request, body.priority, body.prompt_cache_key)
            turn = await target.chats.chat(chat, body.stop_strings(), caller, target.adapter)
            return turn, _completion_writer(turn, target, body, is_chat=True, wants_logprobs=bool(body.logprobs))

        return await answer(request, start(), error_events, is_streamed=bool(body.stream))

    async def completion(self, request: Request) -> Response:
        """Continue one or more prompts, whole or as server-sent events."""
        body, size = await self._requests.body(request, CompletionRequest)
        target = self._requests.target(request, body)

        async def start() -> tuple[Turn, AnswerWriter]:
            completion = await self._requests.prepared(request, target, body, size, PromptEncoder.completion)
            caller = caller_of(request, body.priority, body.prompt_cache_key)
            turn = await target.chats.completion(completion, body.stop_strings(), caller, target.adapter)
            return turn, _completion_writer(
                turn,
                target,
                body,
                is_chat=False,
                wants_logprobs=body.logprobs is not None,
                num_kept=body.n or 1,
                echoes=bool(body.echo),
                wants_prompt=body.prompt_logprobs is not None,
            )

        return await answer(request, start(), error_events, is_streamed=bool(body.stream))

    async def message(self, request: Request) -> Response:
        """Answer a conversation as Anthropic's Messages API does, whole or as server-sent events."""
        body, size = await self._requests.body(request, MessagesRequest)
        target = self._requests.target(request, body)

        async def start() -> tuple[Turn, AnswerWriter]:
            turn = await self._requests.turn(request, target, body, size)
            return turn, MessageWriter(turn, model=target.name)

        return await answer(request, start(), message_failure, is_streamed=bool(body.stream))

    async def count_tokens(self, request: Request) -> Response:
        """Count the tokens that a message's prompt would have."""

        def count(encoder: PromptEncoder, body: CountTokensRequest) -> int:
            with in_words_of(body.FIELDS):
                return len(encoder.prompt_ids(body.to_chat()))

        return json_response(
            {"input_tokens": await self._requests.prepared_at_once(request, CountTokensRequest, count)}
        )

    async def tokenize(self, request: Request) -> Response:
        """Turn a text or a chat into token ids."""
        return JSONResponse(await self._requests.prepared_at_once(request, TokenizeRequest, _tokens))

    async def detokenize(self, request: Request) -> Response:
        """Turn token ids into text."""
        return JSONResponse(await self._requests.prepared_at_once(request, DetokenizeRequest, _text))

    async def health(self, _: Request) -> Response:
        """Answer as long as this process runs."""
        return json_response({"status": "ok"})

    async def version(self, _: Request) -> Response:
        """Return the server's version."""
        return json_response({"version": __version__})

    async def stats(self, _: Request) -> Response:
        """Report what is running and how full the engines are, as this router last heard."""
        return json_response(self._directory.snapshot())

    async def metrics(self, request: Request) -> Response:
        """Return the metrics of all routers and replicas, whichever router is asked, in Prometheus' text format. Those
        that name API keys are for administrators."""
        text = await self._directory.metrics(shows_keys=is_admin(request))
        return Response(text, media_type=CONTENT_TYPE)

    async def chat_page(self, _: Request) -> Response:
        """Return the chat page."""
        return page("chat")

    async def fleet_page(self, _: Request) -> Response:
        """Return the fleet page."""
        return page("fleet")

    async def docs_page(self, _: Request) -> Response:
        """Return the page that describes this API."""
        return page("docs")

    async def events(self, _: Request) -> Response:
        """Report what is running and what happened, as server-sent events, until the client disconnects."""
        return EventStream(watch_fleet(self._directory), error_events)


def _completion_writer(
    turn: Turn, target: Target, body: ChatRequest | CompletionRequest, **options: Any
) -> CompletionWriter:
    include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return CompletionWriter(turn, target.chats.tokenizer, model=target.name, include_usage=include_usage, **options)


def _tokens(encoder: PromptEncoder, body: TokenizeRequest) -> list[bytes]:
    """The answer of `/tokenize`."""
    if body.messages is not None:
        ids = encoder.prompt_ids(body.to_chat())
    else:
        ids = encoder.text_ids(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
    texts = [encoder.tokenizer.token_text(token_id) for token_id in ids] if body.return_token_strs else None
    found = {"count": len(ids), "max_model_len": encoder.info.max_seq_len, "tokens": ids, "token_strs": texts}
    return json_pieces(found)


def _text(encoder: PromptEncoder, body: DetokenizeRequest) -> list[bytes]:
    """The answer of `/detokenize`."""
    encoder.check_ids(body.tokens, "tokens")
    return json_pieces({"prompt": encoder.tokenizer.decode(body.tokens)})
