"""The handlers for the paths of OpenAI's Responses API."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from deployments.api.answering import AnswerWriter, answer, json_response
from deployments.api.callers import tenant_of
from deployments.api.openai.conversations import MAX_PAGE_ITEMS, Conversations
from deployments.api.openai.logprobs import TextLogprobs
from deployments.api.openai.response_requests import ResponsesRequest, echoed
from deployments.api.openai.response_store import ResponseStore
from deployments.api.openai.response_writer import ResponseWriter, response_failure
from deployments.api.openai.responses import DeletedResponse, ResponseItems, ResponseObject
from deployments.api.request_reader import RequestReader
from deployments.api.route_table import Route
from deployments.api.sse import until_disconnect
from deployments.chat.errors import invalid, unsupported
from deployments.chat.turn import Turn

_ONE = "/v1/responses/{response_id}"
_DEFAULT_PAGE_ITEMS = 20


class ResponseEndpoints:
    """Answers requests for new and for stored responses.

    Args:
        requests: reads them, and begins the answers.
        store: where responses are kept; None for nowhere.
    """

    def __init__(self, requests: RequestReader, store: ResponseStore | None) -> None:
        self._requests = requests
        self._conversations = Conversations(store)

    def table(self) -> list[Route]:
        """The routes of this class."""
        return [
            Route("POST", "/v1/responses", self.respond, "Response", ResponseObject, ResponsesRequest),
            Route("GET", f"{_ONE}/input_items", self.input_items, "What a response was made of", ResponseItems),
            Route("GET", _ONE, self.read, "A response that is stored", ResponseObject),
            Route("DELETE", _ONE, self.delete, "Let a response go", DeletedResponse),
        ]

    async def respond(self, request: Request) -> Response:
        """Answer a conversation as OpenAI's Responses API does, whole or as server-sent events."""
        body, size = await self._requests.body(request, ResponsesRequest)
        target = self._requests.target(request, body)
        owner = tenant_of(request)
        conversation = await until_disconnect(request.receive, self._conversations.whole(owner, body))
        is_kept = self._conversations.is_kept(body)

        async def keep(response: dict[str, Any]) -> None:
            await self._conversations.keep(owner, conversation, response)

        async def start() -> tuple[Turn, AnswerWriter]:
            num_bytes = size + sum(len(item.data) for item in conversation.earlier)
            turn = await self._requests.turn(request, target, conversation.body, num_bytes)
            return turn, ResponseWriter(
                turn,
                model=target.name,
                mark=target.mark,
                echoed=await self._requests.threads.run(size, lambda: echoed(body, is_stored=is_kept)),
                names=body.function_names,
                logprobs=TextLogprobs(target.chats.tokenizer) if body.wants_logprobs else None,
                seals_thoughts=body.wants_sealed_thoughts,
                keep=keep if is_kept else None,
            )

        return await answer(request, start(), response_failure, is_streamed=bool(body.stream))

    async def read(self, request: Request) -> Response:
        """Return a stored response."""
        if request.query_params.get("stream", "false") not in ("", "0", "false"):
            raise unsupported("stream", "Streaming of a stored response")
        found = await self._conversations.read(tenant_of(request), request.path_params["response_id"])
        return Response(found, media_type="application/json")

    async def delete(self, request: Request) -> Response:
        """Delete a stored response."""
        return json_response(await self._conversations.delete(tenant_of(request), request.path_params["response_id"]))

    async def input_items(self, request: Request) -> Response:
        """List the input of a stored response, which is the whole conversation before it, newest first."""
        query = request.query_params
        limit, order = query.get("limit", str(_DEFAULT_PAGE_ITEMS)), query.get("order", "desc")
        if not (limit.isascii() and limit.isdigit() and len(limit) < 4 and 1 <= int(limit) <= MAX_PAGE_ITEMS):
            raise invalid(f"limit: must be a number from 1 to {MAX_PAGE_ITEMS}", "limit")
        if order not in ("asc", "desc"):
            raise invalid("order: must be asc or desc", "order")
        page = await self._conversations.input_items(
            tenant_of(request), request.path_params["response_id"],
            limit=int(limit), is_ascending=order == "asc", after=query.get("after"),
        )  # fmt: skip
        return Response(page, media_type="application/json")
