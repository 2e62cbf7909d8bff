"""The handlers for the paths that answer with vectors and labels of texts, and with scores of texts by texts."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from deployments.api.callers import caller_of
from deployments.api.classification import ClassifyRequest, ClassifyResponse, classify_object
from deployments.api.json_parts import JSONResponse, json_pieces
from deployments.api.openai.embeddings import EmbeddingsRequest, VectorFields, embeddings_object
from deployments.api.openai.responses import EmbeddingList
from deployments.api.pooling import PoolingRequest, PoolingResponse, pooling_object
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
from deployments.chat.labels import cannot_classify, check_generates, label_request
from deployments.chat.pair_prompts import ScoreOptions
from deployments.chat.scoring import PairWork, cannot_score
from deployments.chat.truncation import encode_inputs
from deployments.chat.vectors import VectorStyle, cut
from llm.serving.schemas import GenerationRequest, Pooling

Embedded = TypeVar("Embedded", EmbeddingsRequest, ClassifyRequest, PoolingRequest)


class VectorEndpoints:
    """Answers requests for vectors, for labels and for scores.

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
            *(
                Route("POST", path, self.classify, "Labels of texts", ClassifyResponse, ClassifyRequest)
                for path in ("/v1/classify", "/classify")
            ),
            Route("POST", "/pooling", self.pooling, "Vectors or labels of texts", PoolingResponse, PoolingRequest),
        ]

    async def embeddings(self, request: Request) -> Response:
        """Return a vector for each input: the model's hidden states, pooled and normalized to length 1."""
        body, size = await self._requests.body(request, EmbeddingsRequest)
        target = self._requests.target(request, body)

        def prepare(encoder: PromptEncoder, body: EmbeddingsRequest) -> list[GenerationRequest]:
            return _to_embed(target.chats.vectors, encoder, body, body.inputs())

        vectors, num_tokens = await self._vectors(request, target, body, size, prepare)
        return await _written(lambda: embeddings_object(body, target.name, cut(vectors, body.dimensions), num_tokens))

    async def classify(self, request: Request) -> Response:
        """Return the probabilities of each input's labels, by a classifier."""
        body, size = await self._requests.body(request, ClassifyRequest)
        target = self._requests.target(request, body)
        labels = target.chats.labels
        if labels is None:
            raise cannot_classify()

        def prepare(encoder: PromptEncoder, body: ClassifyRequest) -> list[GenerationRequest]:
            return [label_request(ids) for ids in body.prompts(encoder)]

        vectors, num_tokens = await self._vectors(request, target, body, size, prepare)
        return await _written(lambda: classify_object(body, target.name, vectors, labels, num_tokens))

    async def pooling(self, request: Request) -> Response:
        """Return what a model makes of each input as a whole: a vector, or the probabilities of a classifier's
        labels."""
        body, size = await self._requests.body(request, PoolingRequest)
        target = self._requests.target(request, body)
        labels = target.chats.labels
        body.check_model(is_classifier=labels is not None)

        def prepare(encoder: PromptEncoder, body: PoolingRequest) -> list[GenerationRequest]:
            if labels is None:
                return _to_embed(target.chats.vectors, encoder, body, body.inputs())
            return [label_request(ids) for ids in encode_inputs(encoder, body.inputs(), body.truncation)]

        vectors, num_tokens = await self._vectors(request, target, body, size, prepare)
        return await _written(lambda: pooling_object(body, target.name, vectors, labels, num_tokens))

    async def _vectors(
        self,
        request: Request,
        target: Target,
        body: Embedded,
        size: int,
        prepare: Callable[[PromptEncoder, Embedded], list[GenerationRequest]],
    ) -> tuple[list[bytes], int]:
        """The vectors that a body's inputs give, and how many tokens were read for them."""

        async def compute() -> tuple[list[bytes], int]:
            requests = await self._requests.prepared(request, target, body, size, prepare)
            vectors = await target.router.vectors(requests, caller_of(request, body.priority), target.adapter)
            return vectors, sum(len(each.prompt_token_ids or ()) for each in requests)

        return await until_disconnect(request.receive, compute())

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


def _to_embed(
    style: VectorStyle, encoder: PromptEncoder, body: VectorFields, given: Sequence[Any]
) -> list[GenerationRequest]:
    """The requests for the vectors of a body's inputs.

    Raises:
        APIError: a 400.
    """
    check_generates(encoder.info)
    style.check_dimensions(body.dimensions, encoder.info.vector_size)
    pooling = Pooling(body.pooling) if body.pooling is not None else style.pooling
    inputs = style.inputs(encoder, given, body.prompt_name, body.truncation)
    return [GenerationRequest(prompt_token_ids=tuple(ids), pooling=pooling) for ids in inputs]


async def _written(make: Callable[[], dict[str, Any]]) -> Response:
    """The answer in JSON, made in a thread because it may be large."""
    return JSONResponse(await asyncio.to_thread(lambda: json_pieces(make())))
