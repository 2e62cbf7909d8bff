"""The prompts of cross-encoders: one of each query and document."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.chat.encoder import PromptEncoder
from deployments.chat.errors import in_words_of, invalid
from deployments.vectors_config import QWEN3_RERANKER, ScoringConfig
from llm.checkpoint.vector_defaults import VectorDefaults
from llm.errors import ConfigError
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


@dataclass(frozen=True, slots=True)
class PairTemplate:
    """Makes a prompt of a query and a document.

    Attributes:
        template: is given the two as messages.
        instruction: for requests without one; None for what the template itself says.
    """

    template: ChatTemplate
    instruction: str | None

    def ids(self, encoder: PromptEncoder, pair: Pair, options: ScoreOptions) -> list[int]:
        """Tokens of the prompt.

        Raises:
            APIError: a 400.
        """
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


def joined_pairs(encoder: PromptEncoder, pairs: Sequence[Pair], options: ScoreOptions) -> list[list[int]]:
    """Tokens of each query with its document, as the tokenizer joins two texts.

    Raises:
        APIError: a 400; `instruction` and other variables have no place in such a prompt.
    """
    refuse_variables(options, "this model reads the two texts without a template")
    for param, texts in zip(options.params, zip(*pairs, strict=True), strict=True):
        for text in dict.fromkeys(texts):
            encoder.check_text(text, param)
    batch = encoder.tokenizer.encode_pairs(pairs)
    for ids in batch:
        encoder.check_length(ids, options.params[1])
    return batch


def refuse_variables(options: ScoreOptions, why: str) -> None:
    """Refuse variables of a prompt where no template takes them.

    Raises:
        APIError: a 400.
    """
    if options.variables:
        name = next(iter(options.variables))
        raise invalid(f"{name}: {why}, so there is no prompt to put it into", name)


def pair_template(
    config: ScoringConfig, defaults: VectorDefaults, tokenizer: HFTokenizer, *, is_needed: bool
) -> PairTemplate | None:
    """The template of a cross-encoder's prompt; None if nothing names one.

    Args:
        is_needed: take that of Qwen3-Reranker if nothing names one.

    Raises:
        ConfigError: it does not fit the model.
    """
    instruction = config.instruction
    if instruction is None and defaults.default_prompt is not None:
        instruction = defaults.prompts[defaults.default_prompt]
    own, given = tokenizer.default_template, config.template_text()
    if given and given != QWEN3_RERANKER:
        return PairTemplate(tokenizer.new_template(given, "scoring.template"), instruction)
    if not given and own is not None and _READS_ROLES.search(own.source):
        return PairTemplate(own, instruction)
    if not given and not is_needed:
        return None
    if all(token_id is None for _, token_id in tokenizer.split_control(_NEEDED)):
        raise ConfigError(
            f"scoring: this model has no token {_NEEDED} for Qwen3-Reranker's prompt; set scoring.template"
        )
    template = tokenizer.new_template(DEFAULT_TEMPLATE, "the prompt of Qwen3-Reranker")
    return PairTemplate(template, instruction or DEFAULT_INSTRUCTION)
