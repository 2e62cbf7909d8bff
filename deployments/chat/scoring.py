"""How well documents answer queries: by a cross-encoder that says yes or no, or by the cosine of vectors."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from deployments.chat.encoder import PromptEncoder
from deployments.chat.errors import APIError, in_words_of, invalid
from deployments.chat.vectors import VectorStyle
from deployments.vectors_config import ScoringConfig, ScoringMethod
from llm.checkpoint.vector_defaults import VectorDefaults, YesNo
from llm.errors import ConfigError
from llm.serving.schemas import GenerationRequest
from llm.tokenization.chat_template import ChatTemplate
from llm.tokenization.hf_tokenizer import HFTokenizer

DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_QUERY = "{{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}"
_DOCUMENT = "{{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}"
_TASK = " ".join((
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note",
    'that the answer can only be "yes" or "no".',
))  # fmt: skip
DEFAULT_TEMPLATE = (
    f"<|im_start|>system\n{_TASK}<|im_end|>\n<|im_start|>user\n<Instruct>: {{{{ instruction }}}}\n"
    f"<Query>: {_QUERY}\n<Document>: {_DOCUMENT}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n{{ '\n' }}"
)
"""The prompt of Qwen3-Reranker's model card, as a template."""
_NEEDED = "<|im_start|>"
_READS_ROLES = re.compile(r"""['"]query['"].*['"]document['"]|['"]document['"].*['"]query['"]""", re.DOTALL)
Pair = tuple[str, str]
"""A query and a document."""


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


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """What a request says of how its pairs are scored.

    Attributes:
        variables: for the prompt's template, such as `instruction`.
        is_raw: give what the last function would turn into a score.
        params: what the request calls its queries and its documents, for errors.
    """

    variables: Mapping[str, Any]
    is_raw: bool
    params: tuple[str, str]


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
        template: makes the prompt.
        instruction: for requests without one; None for what the template itself says.
        token_ids: of "yes" and of "no".
    """

    template: ChatTemplate
    instruction: str | None
    token_ids: tuple[int, int]

    def work(self, encoder: PromptEncoder, pairs: Sequence[Pair], options: ScoreOptions) -> PairWork:
        """See `Scorer`."""
        requests = [
            GenerationRequest(
                prompt_token_ids=tuple(self._prompt(encoder, pair, options)),
                max_new_tokens=0,
                allowed_token_ids=self.token_ids,
                scores_allowed=True,
            )
            for pair in pairs
        ]
        return PairWork(requests, lambda vectors: [_yes_score(vector, is_raw=options.is_raw) for vector in vectors])

    def _prompt(self, encoder: PromptEncoder, pair: Pair, options: ScoreOptions) -> list[int]:
        variables = dict(options.variables)
        instruction = variables.setdefault("instruction", self.instruction)
        if instruction is None:
            del variables["instruction"]
        query, document = pair
        messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
        if instruction is not None:
            messages.insert(0, {"role": "system", "content": instruction})
        with in_words_of({"messages": options.params[1]}):
            chat = encoder.tokenizer.render(self.template, messages, variables)
        encoder.check_text(chat.text, options.params[1])
        ids = encoder.tokenizer.encode_chat(chat)
        encoder.check_length(ids, options.params[1])
        return ids


@dataclass(frozen=True, slots=True)
class CosineScorer:
    """The cosine of the vectors of query and document.

    Attributes:
        style: how the vectors are made.
    """

    style: VectorStyle

    def work(self, encoder: PromptEncoder, pairs: Sequence[Pair], options: ScoreOptions) -> PairWork:
        """See `Scorer`; a text that stands in several pairs is read once."""
        if options.variables:
            name = next(iter(options.variables))
            raise invalid(f"{name}: this model compares vectors, so there is no prompt to put it into", name)
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
    instruction = config.instruction
    if instruction is None and defaults.default_prompt is not None:
        instruction = defaults.prompts[defaults.default_prompt]
    own = tokenizer.default_template
    if config.template is not None:
        template = tokenizer.new_template(config.template_text(), "scoring.template")
    elif own is not None and _READS_ROLES.search(own.source):
        template = own
    elif all(token_id is None for _, token_id in tokenizer.split_control(_NEEDED)):
        raise ConfigError(
            f"scoring: this model has no token {_NEEDED} for Qwen3-Reranker's prompt; set scoring.template"
        )
    else:
        template = tokenizer.new_template(DEFAULT_TEMPLATE, "the prompt of Qwen3-Reranker")
        instruction = instruction or DEFAULT_INSTRUCTION
    return YesNoScorer(template, instruction, (yes, no))


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
