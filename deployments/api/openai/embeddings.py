"""`POST /v1/embeddings`: bodies and answers."""

import base64
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from deployments.chat.errors import invalid
from deployments.chat.requests import Priority, Prompt, check_prompt
from deployments.chat.vectors import Vectors
from deployments.chat.wire_model import NoEffect, RequestBody

MAX_INPUTS = 2048


def check_input(value: Any) -> Any:
    """See `check_prompt`."""
    return check_prompt(value, "input")


class EmbeddingsRequest(RequestBody):
    """Body of `POST /v1/embeddings`."""

    model: str
    input: Annotated[Any, BeforeValidator(check_input, json_schema_input_type=Prompt)]
    """A text, a list of texts, token ids, or a list of lists of token ids."""
    encoding_format: Literal["float", "base64"] | None = None
    """`base64` for little-endian 32-bit floats."""
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """How many of its first numbers each vector keeps, if the model is trained for it (Matryoshka); all by default."""
    user: NoEffect = None
    pooling: Literal["last", "mean"] | None = None
    """Extension. `last` for the last token's hidden state, `mean` for the average of all; what the model's files say by
    default."""
    prompt_name: str | None = None
    """Extension. The prompt of the model's `config_sentence_transformers.json` that goes in front of each text, such as
    `query`; by default what that file names as the default, or none."""
    priority: Priority | None = None
    """Extension. Waiting requests with lower values go first; 0 by default. The API key limits how low it may be."""

    def inputs(self) -> list[Any]:
        """One entry for each vector.

        Raises:
            APIError: there are too many.
        """
        return inputs_of(self.input)


def inputs_of(given: Any) -> list[Any]:
    """A text, or token ids, for each of the inputs given.

    Raises:
        APIError: there are too many.
    """
    several = not isinstance(given, str) and not isinstance(given[0], int)
    inputs = list(given) if several else [given]
    if len(inputs) > MAX_INPUTS:
        raise invalid(f"input: at most {MAX_INPUTS} inputs", "input")
    return inputs


def embeddings_object(body: EmbeddingsRequest, model: str, vectors: Vectors, num_tokens: int) -> dict[str, Any]:
    """The answer.

    Args:
        vectors: one for each input.
    """
    encode = _base64 if body.encoding_format == "base64" else _numbers
    data = [{"object": "embedding", "index": i, "embedding": encode(vector)} for i, vector in enumerate(vectors)]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _base64(vector: Vectors) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _numbers(vector: Vectors) -> list[float]:
    numbers: list[float] = vector.tolist()
    return numbers
