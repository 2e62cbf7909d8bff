"""What a model's vectors are made of: pooling, prompts in front of inputs, and how many dimensions they may have."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from deployments.chat.encoder import PromptEncoder
from deployments.chat.errors import invalid
from deployments.chat.truncation import Truncation, encode_inputs
from deployments.vectors_config import EmbeddingsConfig, PoolingName
from llm.checkpoint.vector_defaults import VectorDefaults
from llm.errors import ConfigError
from llm.serving.schemas import Pooling

Vectors = npt.NDArray[np.float32]

_PROMPT_NAMES = {"query": ("query", "search_query"), "document": ("document", "passage", "corpus", "search_document")}
"""What checkpoints call the prompts of the two sides of a search."""


@dataclass(frozen=True, slots=True)
class VectorStyle:
    """How a model's vectors are made.

    Attributes:
        pooling: for requests that name none.
        defaults: what the checkpoint says.
        is_matryoshka: whether requests may ask for fewer dimensions.
        sizes: how many they may ask for; empty for any number.
    """

    pooling: Pooling
    defaults: VectorDefaults
    is_matryoshka: bool
    sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: EmbeddingsConfig, defaults: VectorDefaults) -> Self:
        """What the configuration says, and else the checkpoint.

        Raises:
            ConfigError: the checkpoint's vectors cannot be made as it says, and the configuration says nothing else.
        """
        if config.pooling is not PoolingName.MODEL:
            pooling = Pooling(config.pooling)
        elif defaults.pooling_refusal is not None:
            raise ConfigError(f"{defaults.pooling_refusal}; use another model, or set embeddings.pooling: last or mean")
        else:
            pooling = defaults.pooling or Pooling.LAST
        is_given = config.is_matryoshka is not None or config.matryoshka_dimensions is not None
        sizes = config.matryoshka_dimensions if is_given else defaults.dimensions
        is_matryoshka = bool(sizes) if config.is_matryoshka is None else config.is_matryoshka
        return cls(pooling, defaults, is_matryoshka if is_given else defaults.is_matryoshka, tuple(sizes or ()))

    def check_dimensions(self, dimensions: int | None, vector_size: int) -> None:
        """Refuse a number of dimensions that this model's vectors cannot have.

        Args:
            dimensions: what a request asks for; None for all.
            vector_size: how many the model's vectors have.

        Raises:
            APIError: a 400.
        """
        if dimensions is None or dimensions == vector_size:
            return
        if dimensions > vector_size:
            raise invalid(f"dimensions: this model's vectors have {vector_size}; ask for no more", "dimensions")
        if not self.is_matryoshka:
            raise invalid(
                f"dimensions: this model's vectors have {vector_size}, and it is not known to be trained for fewer "
                "(Matryoshka); leave the field out",
                "dimensions",
            )
        if self.sizes and dimensions not in self.sizes:
            sizes = ", ".join(map(str, self.sizes))
            raise invalid(f"dimensions: this model's vectors can be cut to {sizes} only", "dimensions")

    def prompt(self, name: str | None, param: str = "prompt_name") -> str:
        """The text that goes in front of inputs.

        Args:
            name: the prompt that a request names; None for the model's default.
            param: the request's field.

        Raises:
            APIError: a 400; the model has no such prompt.
        """
        prompts = self.defaults.prompts
        if name is None:
            name = self.defaults.default_prompt
            return "" if name is None else prompts[name]
        if name not in prompts:
            names = ", ".join(map(repr, prompts)) or "none"
            raise invalid(f"{param}: this model has no prompt {name[:100]!r}; it has {names}", param)
        return prompts[name]

    def side_prompt(self, side: str) -> str:
        """The text in front of the `query` or the `document` of a search: the prompt of that name, or the default's."""
        found = next((name for name in _PROMPT_NAMES[side] if name in self.defaults.prompts), None)
        return self.prompt(found)

    def inputs(
        self,
        encoder: PromptEncoder,
        inputs: Sequence[str | list[int]],
        name: str | None,
        truncation: Truncation | None = None,
    ) -> list[list[int]]:
        """Tokens of each input, with its prompt.

        Args:
            encoder: knows tokenizer and limits.
            inputs: texts, or token ids, which are taken as they are.
            name: the prompt that the request names.
            truncation: what becomes of inputs that are too long; None if they are errors.

        Raises:
            APIError: a 400.
        """
        prompt = self.prompt(name)
        if name is not None and not all(isinstance(item, str) for item in inputs):
            raise invalid("prompt_name: only for texts; token ids are taken as they are", "prompt_name")
        whole = [prompt + item if isinstance(item, str) else item for item in inputs]
        return encode_inputs(encoder, whole, truncation)


def cut(vectors: Sequence[bytes], dimensions: int | None) -> Vectors:
    """Vectors as an array (vectors, dimensions), cut to their first dimensions if there are more, each of length 1.

    Args:
        vectors: 32-bit floats of each.
        dimensions: how many to keep; None for all.
    """
    whole = np.stack([np.frombuffer(vector, np.float32) for vector in vectors])
    if dimensions is None or dimensions == whole.shape[1]:
        return whole
    kept = whole[:, :dimensions]
    norms = np.linalg.norm(kept, axis=1, keepdims=True)
    return np.asarray(kept / np.maximum(norms, np.finfo(np.float32).tiny), dtype=np.float32)
