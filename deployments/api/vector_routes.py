"""The handlers for the paths that answer with vectors of texts, and with scores of texts by texts."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from deployments.api.callers import caller_of
from deployments.api.json_parts import JSONResponse, json_pieces
from deployments.api.openai.embeddings import EmbeddingsRequest, embeddings_object
from deployments.api.openai.responses import EmbeddingList
from deployments.api.request_reader import RequestReader, Target
from deployments.api.route_table import Route
from deployments.api.scores import (
    RerankRequest,
    RerankResponse,
    ScoreRequest,
    ScoreResponse,
    rerank_object,
    score_object,
)
from deployments.api.sse import until_disconnect
from deployments.chat.encoder import PromptEncoder
from deployments.chat.scoring import PairWork, ScoreOptions, cannot_score
from deployments.chat.vectors import cut
from llm.core.pooling import Pooling
from llm.serving.schemas import GenerationRequest


class VectorEndpoints:
    """Answers requests for vectors and for scores.

    Args:
        requests: reads the HTTP requests, and finds the models that they are for.
    """

    def __init__(self, requests: RequestReader) -> None:
        self._requests = requests

    def table(self) -> list[Route]:
        """The routes of this class."""
        return [
            Route("POST", "/v1/embeddings", self.embeddings, "Vectors of texts", EmbeddingList, EmbeddingsRequest),
            *(
                Route("POST", path, self.rerank, "Documents in order of relevance", RerankResponse, RerankRequest)
                for path in ("/v1/rerank", "/v2/rerank", "/rerank")
            ),
            *(
                Route("POST", path, self.score, "Scores of pairs of texts", ScoreResponse, ScoreRequest)
                for path in ("/v1/score", "/score")
            ),
        ]

    async def embeddings(self, request: Request) -> Response:
        """Return a vector for each input: the model's hidden states, pooled and normalized to length 1."""
        body, size = await self._requests.body(request, EmbeddingsRequest)
        target = self._requests.target(request, body)

        def prepare(encoder: PromptEncoder, body: EmbeddingsRequest) -> list[GenerationRequest]:
            vectors = target.chats.vectors
            vectors.check_dimensions(body.dimensions, encoder.info.vector_size)
            pooling = Pooling(body.pooling) if body.pooling is not None else vectors.pooling
            inputs = vectors.inputs(encoder, body.inputs(), body.prompt_name)
            return [GenerationRequest(prompt_token_ids=tuple(ids), pooling=pooling) for ids in inputs]

        async def embed() -> tuple[list[GenerationRequest], list[bytes]]:
            requests = await self._requests.prepared(request, target, body, size, prepare)
            caller = caller_of(request, body.priority)
            return requests, await target.router.vectors(requests, caller, target.adapter)

        requests, vectors = await until_disconnect(request.receive, embed())
        num_tokens = sum(len(each.prompt_token_ids or ()) for each in requests)
        return await _written(lambda: embeddings_object(body, target.name, cut(vectors, body.dimensions), num_tokens))

    async def rerank(self, request: Request) -> Response:
        """Order documents by how well they answer a query."""
        body, size = await self._requests.body(request, RerankRequest)
        options = body.options("query", "documents")
        target = self._requests.target(request, body)
        scores, num_tokens = await self._scored(request, target, body, size, options)
        return await _written(lambda: rerank_object(body, target.name, scores, num_tokens))

    async def score(self, request: Request) -> Response:
        """Score pairs of texts."""
        body, size = await self._requests.body(request, ScoreRequest)
        target = self._requests.target(request, body)
        scores, num_tokens = await self._scored(request, target, body, size, body.options(*body.params))
        return await _written(lambda: score_object(target.name, scores, num_tokens))

    async def _scored(
        self, request: Request, target: Target, body: RerankRequest | ScoreRequest, size: int, options: ScoreOptions
    ) -> tuple[Sequence[float], int]:
        """Score a request's pairs.

        Returns:
            The scores, and how many tokens were read for them.
        """

        scorer = target.chats.scorer
        if scorer is None:
            raise cannot_score()

        def prepare(encoder: PromptEncoder, body: RerankRequest | ScoreRequest) -> PairWork:
            return scorer.work(encoder, body.pairs(), options)

        async def compute() -> tuple[Sequence[float], int]:
            work = await self._requests.prepared(request, target, body, size, prepare)
            caller = caller_of(request, body.priority)
            vectors = await target.router.vectors(work.requests, caller, target.adapter)
            return work.scores(vectors), work.num_tokens

        return await until_disconnect(request.receive, compute())


async def _written(make: Callable[[], dict[str, Any]]) -> Response:
    """The answer in JSON, made in a thread because it may be large."""
    return JSONResponse(await asyncio.to_thread(lambda: json_pieces(make())))
