"""`POST /pooling`: bodies and answers, in vLLM's form."""

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator

from deployments.api.openai.embeddings import VectorFields, check_input, inputs_of, written
from deployments.api.openai.responses import EmbeddingUsage, ResponseModel
from deployments.chat.errors import invalid
from deployments.chat.labels import activated
from deployments.chat.requests import Prompt
from deployments.chat.vectors import Vectors, cut
from llm.checkpoint.label_defaults import LabelActivation, LabelDefaults
from llm.serving.schemas import new_request_id

_OF_VECTORS = ("dimensions", "pooling", "prompt_name")


def _check_task(value: Any) -> Any:
    if value in ("token_embed", "token_classify"):
        raise invalid("task: this server gives one vector a text, and none a token; ask for embed or classify", "task")
    return value


class PoolingRequest(VectorFields):
    """Body of `POST /pooling`."""

    input: Annotated[Any, BeforeValidator(check_input, json_schema_input_type=Prompt)]
    """A text, a list of texts, token ids, or a list of lists of token ids."""
    task: Annotated[Literal["embed", "classify"] | None, BeforeValidator(_check_task)] = None
    """What to compute; by default what the model is for. Classifiers do nothing but classify, and others embed."""
    use_activation: bool | None = None
    """With a classifier: false for the logits in place of the probabilities."""

    def inputs(self) -> list[Any]:
        """One entry for each vector.

        Raises:
            APIError: there are too many.
        """
        return inputs_of(self.input)

    def check_model(self, *, is_classifier: bool) -> None:
        """Refuse what this kind of model does not do.

        Raises:
            APIError: a 400.
        """
        if self.task is not None and (self.task == "classify") != is_classifier:
            does = "gives labels to texts: ask it to classify" if is_classifier else "makes vectors: ask it to embed"
            raise invalid(f"task: this model {does}", "task")
        for name in _OF_VECTORS:
            if is_classifier and getattr(self, name) is not None:
                raise invalid(f"{name}: not with a model that gives labels to texts", name)
        if not is_classifier and self.use_activation is False:
            raise invalid("use_activation: every vector has length 1; leave it out", "use_activation")


class PooledText(ResponseModel):
    """The vector of one input."""

    index: int
    object: Literal["pooling"]
    data: list[float] | str
    """Its numbers, in base64 if the request asked for that; the probability of each label from a classifier."""


class PoolingResponse(ResponseModel):
    """Answer of `POST /pooling`."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[PooledText]
    usage: EmbeddingUsage


def pooling_object(
    body: PoolingRequest, model: str, vectors: Sequence[bytes], labels: LabelDefaults | None, num_tokens: int
) -> dict[str, Any]:
    """The answer.

    Args:
        vectors: of each input, as the engines give them.
        labels: of a classifier; None for other models.
    """
    numbers = cut(vectors, body.dimensions) if labels is None else _probabilities(body, vectors, labels)
    data = [
        {"index": index, "object": "pooling", "data": written(vector, body.encoding_format)}
        for index, vector in enumerate(numbers)
    ]
    head = {"id": f"pool-{new_request_id()}", "object": "list", "created": int(time.time()), "model": model}
    return {**head, "data": data, "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens}}


def _probabilities(body: PoolingRequest, vectors: Sequence[bytes], labels: LabelDefaults) -> Vectors:
    activation = LabelActivation.IDENTITY if body.use_activation is False else labels.activation
    return np.array([activated(vector, activation) for vector in vectors], np.float32)
