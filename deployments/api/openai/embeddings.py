"""`POST /v1/embeddings`: bodies and answers."""

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from deployments.chat.errors import invalid
from deployments.chat.requests import Priority, Prompt, check_prompt
from deployments.chat.wire_model import NoEffect, RequestBody

MAX_INPUTS = 2048
_BYTES_A_NUMBER = 4


def _check_input(value: Any) -> Any:
    return check_prompt(value, "input")


class EmbeddingsRequest(RequestBody):
    """Body of `POST /v1/embeddings`."""

    model: str
    input: Annotated[Any, BeforeValidator(_check_input, json_schema_input_type=Prompt)]
    """A text, a list of texts, token ids, or a list of lists of token ids."""
    encoding_format: Literal["float", "base64"] | None = None
    """`base64` for little-endian 32-bit floats."""
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Only the model's own number of dimensions."""
    user: NoEffect = None
    pooling: Literal["last", "mean"] | None = None
    """Extension. `last` for the last token's hidden state, `mean` for the average of all; `last` by default."""
    priority: Priority | None = None
    """Extension. Waiting requests with lower values go first; 0 by default. The API key limits how low it may be."""

    def inputs(self) -> list[Any]:
        """One entry for each vector.

        Raises:
            APIError: there are too many.
        """
        several = not isinstance(self.input, str) and not isinstance(self.input[0], int)
        inputs = list(self.input) if several else [self.input]
        if len(inputs) > MAX_INPUTS:
            raise invalid(f"input: at most {MAX_INPUTS} inputs", "input")
        return inputs


def embeddings_object(body: EmbeddingsRequest, model: str, vectors: Sequence[bytes], num_tokens: int) -> dict[str, Any]:
    """The answer.

    Args:
        vectors: one for each input, as 32-bit floats.

    Raises:
        APIError: the request asks for a number of dimensions that the model does not have.
    """
    num_dimensions = len(vectors[0]) // _BYTES_A_NUMBER
    if body.dimensions not in (None, num_dimensions):
        raise invalid(f"dimensions: this model's vectors have {num_dimensions}", "dimensions")
    encode = _base64 if body.encoding_format == "base64" else _numbers
    data = [{"object": "embedding", "index": i, "embedding": encode(vector)} for i, vector in enumerate(vectors)]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _base64(vector: bytes) -> str:
    return base64.b64encode(np.frombuffer(vector, np.float32).astype("<f4").tobytes()).decode()


def _numbers(vector: bytes) -> list[float]:
    numbers: list[float] = np.frombuffer(vector, np.float32).tolist()
    return numbers
