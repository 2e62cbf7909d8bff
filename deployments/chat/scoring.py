"""How well documents answer queries: by a cross-encoder that says yes or no or has a head for one label, or by the
cosine of vectors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from deployments.chat.encoder import PromptEncoder
from deployments.chat.errors import APIError, invalid
from deployments.chat.labels import activated, label_request
from deployments.chat.pair_prompts import (
    Pair,
    PairTemplate,
    ScoreOptions,
    joined_pairs,
    pair_template,
    refuse_variables,
)
from deployments.chat.vectors import VectorStyle
from deployments.vectors_config import ScoringConfig, ScoringMethod
from llm.checkpoint.label_defaults import LabelActivation, LabelDefaults
from llm.checkpoint.vector_defaults import VectorDefaults, YesNo
from llm.errors import ConfigError
from llm.serving.schemas import GenerationRequest
from llm.tokenization.hf_tokenizer import HFTokenizer


@dataclass(frozen=True, slots=True)
class PairWork:
    """What the engines compute to score some pairs.

    Attributes:
        requests: each gives a vector.
        scores: turns these vectors into a score for each pair.
    """

    requests: list[GenerationRequest]
    scores: Callable[[Sequence[bytes]], list[float]]

    @property
    def num_tokens(self) -> int:
        """Prompt tokens of all requests."""
        return sum(len(request.prompt_token_ids or ()) for request in self.requests)


class Scorer(Protocol):
    """Scores queries and documents."""

    def work(self, encoder: PromptEncoder, pairs: Sequence[Pair], options: ScoreOptions) -> PairWork:
        """What to compute for these pairs, at least one.

        Args:
            encoder: knows tokenizer and limits.

        Raises:
            APIError: a 400.
        """
        ...


@dataclass(frozen=True, slots=True)
class YesNoScorer:
    """A cross-encoder: it reads query and document, and the score is the probability of "yes" against "no" as its next
    token (softmax over the two logits).

    Attributes:
        prompt: makes the prompt.
        token_ids: of "yes" and of "no".
    """

    prompt: PairTemplate
    token_ids: tuple[int, int]

    def work(self, encoder: PromptEncoder, pairs: Sequence[Pair], options: ScoreOptions) -> PairWork:
        """See `Scorer`."""
        requests = [
            GenerationRequest(
                prompt_token_ids=tuple(self.prompt.ids(encoder, pair, options)),
                max_new_tokens=0,
                allowed_token_ids=self.token_ids,
                scores_allowed=True,
            )
            for pair in pairs
        ]
        return PairWork(requests, lambda vectors: [_yes_score(vector, is_raw=options.is_raw) for vector in vectors])


@dataclass(frozen=True, slots=True)
class LabelScorer:
    """A cross-encoder with a head for labels: it reads query and document, and the score is that of its only label.

    Attributes:
        prompt: makes the prompt; None for the two texts as the tokenizer joins them.
        labels: of the model.
        refusal: why it cannot score; None if it can.
    """

    prompt: PairTemplate | None
    labels: LabelDefaults
    refusal: str | None = None

    def work(self, encoder: PromptEncoder, pairs: Sequence[Pair], options: ScoreOptions) -> PairWork:
        """See `Scorer`."""
        if self.refusal is not None:
            raise invalid(f"model: {self.refusal}", "model")
        if self.prompt is not None:
            prompts = [self.prompt.ids(encoder, pair, options) for pair in pairs]
        else:
            prompts = joined_pairs(encoder, pairs, options)
        activation = LabelActivation.IDENTITY if options.is_raw else self.labels.score_activation
        requests = [label_request(ids) for ids in prompts]
        return PairWork(requests, lambda vectors: [activated(vector, activation)[0] for vector in vectors])


@dataclass(frozen=True, slots=True)
class CosineScorer:
    """The cosine of the vectors of query and document.

    Attributes:
        style: how the vectors are made.
    """

    style: VectorStyle

    def work(self, encoder: PromptEncoder, pairs: Sequence[Pair], options: ScoreOptions) -> PairWork:
        """See `Scorer`; a text that stands in several pairs is read once."""
        refuse_variables(options, "this model compares vectors")
        queries, documents = (list(dict.fromkeys(pair[side] for pair in pairs)) for side in (0, 1))
        requests = [
            GenerationRequest(prompt_token_ids=tuple(ids), pooling=self.style.pooling)
            for side, texts, param in zip(("query", "document"), (queries, documents), options.params, strict=True)
            for ids in encoder.inputs([self.style.side_prompt(side) + text for text in texts], param)
        ]
        query_at = {text: index for index, text in enumerate(queries)}
        document_at = {text: len(queries) + index for index, text in enumerate(documents)}
        places = [(query_at[query], document_at[document]) for query, document in pairs]
        return PairWork(requests, lambda vectors: _cosines(vectors, places))


def make_scorer(
    config: ScoringConfig, style: VectorStyle, defaults: VectorDefaults, tokenizer: HFTokenizer
) -> Scorer | None:
    """The scorer that the configuration names; where it says `auto`, the one that the checkpoint's files name, and None
    if they name none.

    Raises:
        ConfigError: the model cannot score this way; the message has the fix.
    """
    if defaults.labels is not None:
        return _label_scorer(config, defaults, defaults.labels, tokenizer)
    is_cross_encoder = defaults.yes_no is not None or defaults.scores_refusal is not None
    match config.method:
        case ScoringMethod.YES_NO:
            return _yes_no_scorer(config, defaults, tokenizer)
        case ScoringMethod.EMBEDDINGS:
            return CosineScorer(style)
        case ScoringMethod.AUTO if is_cross_encoder:
            return _yes_no_scorer(config, defaults, tokenizer)
        case ScoringMethod.AUTO:
            return CosineScorer(style) if defaults.is_embedder else None


def cannot_score() -> APIError:
    """The error for a model of which nothing says how it scores."""
    return invalid(
        "model: nothing in this model's files says how it scores queries and documents; the server's operator can set "
        "scoring.method to yes_no or to embeddings",
        "model",
    )


def _label_scorer(
    config: ScoringConfig, defaults: VectorDefaults, labels: LabelDefaults, tokenizer: HFTokenizer
) -> LabelScorer:
    if config.method is not ScoringMethod.AUTO or config.yes_token is not None:
        raise ConfigError(
            "scoring: this model has a head for labels, which makes its scores; leave out method, yes_token and "
            "no_token"
        )
    prompt, refusal = pair_template(config, defaults, tokenizer, is_needed=False), None
    if len(labels.names) > 1:
        refusal = f"this model gives {len(labels.names)} labels to a text, and no single score; ask POST /classify"
    elif prompt is None and defaults.default_prompt is not None and defaults.prompts[defaults.default_prompt]:
        refusal = (
            "its files name a default prompt, and nothing says where in a pair of texts it goes; the server's operator "
            "can set scoring.template"
        )
    return LabelScorer(prompt, labels, refusal)


def _yes_no_scorer(config: ScoringConfig, defaults: VectorDefaults, tokenizer: HFTokenizer) -> YesNoScorer:
    names = defaults.yes_no or YesNo()
    if config.yes_token is not None:
        names = YesNo(config.yes_token, config.no_token)
    elif defaults.scores_refusal is not None:
        raise ConfigError(f"{defaults.scores_refusal}; set scoring.yes_token and scoring.no_token, or another method")
    yes, no = (
        _token_id(tokenizer, wanted if wanted is not None else default, f"{default}_token")
        for wanted, default in ((names.yes, "yes"), (names.no, "no"))
    )
    if yes == no:
        raise ConfigError("scoring: yes_token and no_token are the same token; name two")
    prompt = pair_template(config, defaults, tokenizer, is_needed=True)
    assert prompt is not None, "it is needed"
    return YesNoScorer(prompt, (yes, no))


def _token_id(tokenizer: HFTokenizer, wanted: int | str, name: str) -> int:
    found = wanted if isinstance(wanted, int) else tokenizer.token_id(wanted)
    if found is None or found >= tokenizer.vocab_size:
        raise ConfigError(f"scoring: {wanted!r} is not one token of this model's tokenizer; set scoring.{name}")
    return found


def _yes_score(vector: bytes, *, is_raw: bool) -> float:
    """The score, from the log probabilities of the two tokens: their difference is that of their logits."""
    yes, no = np.frombuffer(vector, np.float32).astype(np.float64).tolist()
    difference = yes - no
    if is_raw:
        return float(difference)
    return 1 / (1 + math.exp(-difference)) if difference > 0 else 1 - 1 / (1 + math.exp(difference))


def _cosines(vectors: Sequence[bytes], places: Sequence[tuple[int, int]]) -> list[float]:
    """Of vectors of length 1."""
    array = np.stack([np.frombuffer(vector, np.float32) for vector in vectors]).astype(np.float64)
    return [float(array[query] @ array[document]) for query, document in places]
