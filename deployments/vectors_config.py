"""Settings of vectors and scores; a part of a model's configuration."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from llm.config import StrictModel
from llm.errors import ConfigError

QWEN3_RERANKER = "qwen3_reranker"
"""Stands for a template that is part of this package."""


class PoolingName(StrEnum):
    """Which of a text's final hidden states make its vector."""

    MODEL = "model"
    """Those that the checkpoint's `1_Pooling/config.json` names; the last token's where there is no such file."""
    LAST = "last"
    """The last token's."""
    MEAN = "mean"
    """The average over all tokens."""


class ScoringMethod(StrEnum):
    """How a query and a document are scored."""

    AUTO = "auto"
    """As the checkpoint's files say: by the head of a classifier with one label, by yes and no, or by vectors. A
    checkpoint that says nothing is not asked for scores."""
    YES_NO = "yes_no"
    """A cross-encoder reads both and answers yes or no: the score is how likely it is to say yes."""
    EMBEDDINGS = "embeddings"
    """The cosine of the two vectors."""


class EmbeddingsConfig(StrictModel):
    """Vectors of texts."""

    pooling: PoolingName = PoolingName.MODEL
    """What requests get that name no `pooling`."""
    is_matryoshka: bool | None = None
    """Whether clients may ask for fewer `dimensions` than the model has; None for what the checkpoint's `config.json`
    says under the same name. Right only for a model that was trained for it, such as Qwen3-Embedding."""
    matryoshka_dimensions: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """The numbers of dimensions that clients may ask for; None for what `config.json` says, or else any number."""


class ScoringConfig(StrictModel):
    """Scores of queries and documents."""

    method: ScoringMethod = ScoringMethod.AUTO
    """How a query and a document are scored."""
    template: str | None = Field(default=None, min_length=1)
    """For a cross-encoder: file with a Jinja template of the prompt, the template itself, or `qwen3_reranker` for the
    prompt of Qwen3-Reranker. A template is given `messages` with the roles `query` and `document`, and `instruction`.
    None for the checkpoint's chat template if it reads these roles. Otherwise, None is Qwen3-Reranker's prompt for
    `yes_no`, and for a classifier the two texts as its tokenizer joins them."""
    instruction: str | None = Field(default=None, min_length=1)
    """For a cross-encoder with a template: what requests get that bring no `instruction`. None for the checkpoint's
    own; without one, for Qwen3-Reranker's if its prompt is used."""
    yes_token: str | None = Field(default=None, min_length=1)
    """For `yes_no`: the token that says yes. None for the checkpoint's own; without one, for `yes`."""
    no_token: str | None = Field(default=None, min_length=1)
    """For `yes_no`: the token that says no. None for the checkpoint's own; without one, for `no`."""

    @model_validator(mode="after")
    def _check_tokens(self) -> Self:
        if (self.yes_token is None) != (self.no_token is None):
            raise ValueError("yes_token and no_token go together: give both or neither")
        return self

    def with_template_read(self) -> Self:
        """The same settings with the template's text in place of its file's name, for nodes that lack the file.

        Raises:
            ConfigError: the file cannot be read.
        """
        return self if self.template is None else self.model_copy(update={"template": self.template_text()})

    def template_text(self) -> str:
        """The template's text, or `qwen3_reranker`; empty if there is none.

        Raises:
            ConfigError: its file cannot be read.
        """
        if self.template is None or self.template == QWEN3_RERANKER or "{" in self.template:
            return self.template or ""
        path = Path(self.template).expanduser()
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"scoring.template: {path} cannot be read: {error}; name a file with Jinja text"
            ) from None
