"""`POST /v1/embeddings`: bodies and answers."""

import base64
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from deployments.chat.errors import invalid
from deployments.chat.requests import Priority, Prompt, check_prompt
from deployments.chat.truncation import Truncation
from deployments.chat.vectors import Vectors
from deployments.chat.wire_model import NoEffect, RequestBody, Unsupported

MAX_INPUTS = 2048


def check_input(value: Any) -> Any:
    """See `check_prompt`."""
    return check_prompt(value, "input")


class InputFields(RequestBody):
    """What requests for something about each of several inputs have in common."""

    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    """Extension. Cut inputs that are longer than so many tokens, or with -1 those that are too long for the model. By
    default an input that is too long is an error."""
    truncation_side: Literal["left", "right"] | None = None
    """Extension. Where to cut: `right`, the default, keeps the first tokens, `left` the last."""
    add_special_tokens: Annotated[Any, Unsupported(True)] = None
    """Not supported: texts get the special tokens that the model was trained with; token ids are taken as they are."""
    priority: Priority | None = None
    """Extension. Waiting requests with lower values go first; 0 by default. The API key limits how low it may be."""
    user: NoEffect = None

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _check_truncation(cls, number: int | None) -> int | None:
        if number == 0:
            raise invalid("truncate_prompt_tokens: must be -1, or at least 1", "truncate_prompt_tokens")
        return number

    @property
    def truncation(self) -> Truncation | None:
        """What becomes of inputs that are too long; None if they are errors."""
        most = self.truncate_prompt_tokens
        if most is None:
            return None
        return Truncation(most if most > 0 else None, keeps_end=self.truncation_side == "left")


class VectorFields(InputFields):
    """What requests for vectors have in common."""

    dimensions: Annotated[int, Field(ge=1)] | None = None
    """How many of its first numbers each vector keeps, if the model is trained for it (Matryoshka); all by default."""
    pooling: Literal["last", "mean"] | None = None
    """Extension. `last` for the last token's hidden state, `mean` for the average of all; what the model's files say by
    default."""
    prompt_name: str | None = None
    """Extension. The prompt of the model's `config_sentence_transformers.json` that goes in front of each text, such as
    `query`; by default what that file names as the default, or none."""
    encoding_format: Literal["float", "base64"] | None = None
    """`base64` for little-endian 32-bit floats."""
    embed_dtype: Annotated[Any, Unsupported("float32")] = None
    """Not supported: numbers have 32 bits."""
    endianness: Annotated[Any, Unsupported("little", "native")] = None
    """Not supported: `base64` holds little-endian numbers."""
    normalize: Annotated[Any, Unsupported(True)] = None
    """Not supported: every vector has length 1."""


class EmbeddingsRequest(VectorFields):
    """Body of `POST /v1/embeddings`."""

    input: Annotated[Any, BeforeValidator(check_input, json_schema_input_type=Prompt)]
    """A text, a list of texts, token ids, or a list of lists of token ids."""
    use_activation: Annotated[Any, Unsupported(True)] = None
    """Not supported: every vector has length 1."""

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
    data = [
        {"object": "embedding", "index": i, "embedding": written(vector, body.encoding_format)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def written(vector: Vectors, encoding: str | None) -> str | list[float]:
    """A vector as answers have it: in base64, or as numbers."""
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers
