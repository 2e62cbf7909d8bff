"""`/v1/rerank` and `/v1/score`: bodies and answers, in the forms of Jina, Cohere and vLLM."""

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from deployments.api.openai.embeddings import MAX_INPUTS
from deployments.api.openai.responses import EmbeddingUsage, ResponseModel
from deployments.chat.errors import invalid
from deployments.chat.pair_prompts import Pair, ScoreOptions
from deployments.chat.requests import Priority
from deployments.chat.wire_model import NoEffect, RequestBody, Unsupported
from llm.serving.schemas import new_request_id

Text = str | dict[str, str]
_PAIRS = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))
"""What clients call the texts that they want compared."""
_OF_PAIRS = tuple(dict.fromkeys(name for names in _PAIRS for name in names))


def _text(value: Any, param: str) -> str:
    """A text by itself, or as an object's `text`."""
    if isinstance(value, dict):
        value = value.get("text")
        param = f"{param}.text"
    if not isinstance(value, str):
        raise invalid(f"{param}: must be a text, or an object with a text", param)
    if not value:
        raise invalid(f"{param}: is empty", param)
    return value


def _texts(value: Any, param: str) -> list[str]:
    """A text, or a list of texts."""
    if not isinstance(value, list):
        return [_text(value, param)]
    if not value:
        raise invalid(f"{param}: is empty", param)
    if len(value) > MAX_INPUTS:
        raise invalid(f"{param}: at most {MAX_INPUTS} texts", param)
    return [_text(item, f"{param}[{i}]") for i, item in enumerate(value)]


def _list(value: Any) -> Any:
    if not isinstance(value, list):
        raise invalid("documents: must be a list of texts, or of objects with a text", "documents")
    return _texts(value, "documents")


def _of(param: str) -> BeforeValidator:
    return BeforeValidator(lambda value: _texts(value, param), json_schema_input_type=Text | list[Text])


class ScoringBody(RequestBody):
    """What requests for scores have in common."""

    instruction: str | None = None
    """Extension. For a cross-encoder: what makes a document relevant; by default what the model's files say."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Extension. Further variables for a cross-encoder's prompt."""
    use_activation: bool | None = None
    """Extension. False for a cross-encoder's logit, or its log odds of yes against no, in place of the probability."""
    priority: Priority | None = None
    """Extension. Waiting requests with lower values go first; 0 by default. The API key limits how low it may be."""
    user: NoEffect = None
    truncate_prompt_tokens: Annotated[Any, Unsupported()] = None
    """Not supported: a text that is too long is an error."""
    max_tokens_per_doc: Annotated[Any, Unsupported(0)] = None
    """Not supported, for the same reason."""

    @property
    def takes_long(self) -> bool:
        """See `RequestBody`; a template makes each prompt."""
        return True

    def options(self, query: str, document: str) -> ScoreOptions:
        """How to score.

        Args:
            query, document: what the request calls its texts.
        """
        variables = dict(self.chat_template_kwargs or {})
        if self.instruction is not None:
            variables["instruction"] = self.instruction
        return ScoreOptions(variables, self.use_activation is False, (query, document))


class RerankRequest(ScoringBody):
    """Body of `POST /v1/rerank`."""

    query: Annotated[str, BeforeValidator(lambda value: _text(value, "query"), json_schema_input_type=Text)]
    documents: Annotated[list[str], BeforeValidator(_list, json_schema_input_type=list[Text])]
    """Texts, or objects with a `text`."""
    top_n: Annotated[int, Field(ge=0)] | None = None
    """How many documents to return; all by default, and with 0."""
    return_documents: bool | None = None
    """False to leave the documents out of the answer."""
    rank_fields: Annotated[Any, Unsupported(["text"])] = None
    """Not supported: a document is its `text`."""
    max_chunks_per_doc: Annotated[Any, Unsupported()] = None
    """Not supported: a document is one text."""

    def pairs(self) -> list[Pair]:
        """The query with each document."""
        return [(self.query, document) for document in self.documents]


class ScoreRequest(ScoringBody):
    """Body of `POST /v1/score`: `text_1` and `text_2`, or under their other names. One text may be compared with one or
    with many; or as many with as many, each with its own."""

    text_1: Annotated[list[str] | None, _of("text_1")] = None
    text_2: Annotated[list[str] | None, _of("text_2")] = None
    queries: Annotated[list[str] | None, _of("queries")] = None
    documents: Annotated[list[str] | None, _of("documents")] = None
    items: Annotated[list[str] | None, _of("items")] = None
    data_1: Annotated[list[str] | None, _of("data_1")] = None
    data_2: Annotated[list[str] | None, _of("data_2")] = None

    @model_validator(mode="after")
    def _check_texts(self) -> Self:
        given = {name for name in _OF_PAIRS if getattr(self, name) is not None}
        likely = [names for names in _PAIRS if names[0] in given]
        if len({first for first, _ in likely}) != 1:
            raise invalid("text_1: give text_1 and text_2, or queries and documents", "text_1")
        if given not in map(set, likely):
            first, second = likely[0]
            raise invalid(f"{second}: {first} needs {second} beside it, and nothing else", second)
        first, second = self.params
        num_queries, num_documents = len(getattr(self, first)), len(getattr(self, second))
        if num_queries not in (1, num_documents):
            raise invalid(
                f"{first}: {num_queries} texts cannot be paired with {num_documents} of {second}; give one, or as many",
                first,
            )
        return self

    @property
    def params(self) -> tuple[str, str]:
        """What the request calls its texts."""
        return next(names for names in _PAIRS if all(getattr(self, name) is not None for name in names))

    def pairs(self) -> list[Pair]:
        """The texts to compare, in the order of the answer."""
        queries, documents = (getattr(self, name) for name in self.params)
        return list(zip(queries * (len(documents) // len(queries)), documents, strict=True))


class RerankedDocument(ResponseModel):
    """A document of the request."""

    text: str


class RerankResult(ResponseModel):
    """How well one document answers the query."""

    index: int
    """Its place in the request."""
    relevance_score: float
    document: RerankedDocument | None = None


class RerankResponse(ResponseModel):
    """Answer of `POST /v1/rerank`: best documents first."""

    id: str
    model: str
    results: list[RerankResult]
    usage: EmbeddingUsage


class ScoreEntry(ResponseModel):
    """The score of one pair."""

    index: int
    object: Literal["score"]
    score: float


class ScoreResponse(ResponseModel):
    """Answer of `POST /v1/score`."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ScoreEntry]
    usage: EmbeddingUsage


def rerank_object(body: RerankRequest, model: str, scores: Sequence[float], num_tokens: int) -> dict[str, Any]:
    """The answer; of equal scores the earlier document comes first."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n or None]
    results: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in order]
    if body.return_documents is not False:
        for result in results:
            result["document"] = {"text": body.documents[result["index"]]}
    return {"id": f"rerank-{new_request_id()}", "model": model, "results": results, "usage": _usage(num_tokens)}


def score_object(model: str, scores: Sequence[float], num_tokens: int) -> dict[str, Any]:
    """The answer, in the order of the pairs."""
    data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)]
    head = {"id": f"score-{new_request_id()}", "object": "list", "created": int(time.time()), "model": model}
    return {**head, "data": data, "usage": _usage(num_tokens)}


def _usage(num_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
