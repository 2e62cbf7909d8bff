"""What a router reads from a model's directory: its tokenizer, its recommended settings, and how it writes."""

from dataclasses import dataclass
from typing import Self

from deployments.channel.messages import EngineInfo
from deployments.chat.encoder import PromptEncoder
from deployments.chat.errors import APIError
from deployments.chat.model_format import ModelFormat, find_format
from deployments.chat.requests import ChatRequest
from deployments.chat.scoring import Scorer, make_scorer
from deployments.chat.vectors import VectorStyle
from deployments.config import LimitsConfig
from deployments.model_config import ServedModelConfig, read_chat_template
from llm.checkpoint.generation_defaults import GenerationDefaults, load_generation_defaults
from llm.checkpoint.hub import resolve_model_path
from llm.checkpoint.label_defaults import LabelDefaults
from llm.checkpoint.vector_defaults import load_vector_defaults
from llm.errors import ConfigError, InvalidRequestError
from llm.sampling.grammar import GrammarCompiler
from llm.tokenization.hf_tokenizer import HFTokenizer

_ENDLESS = 2**31 - 1
_SAMPLE_TEXT = "What is the capital of France?"
_SAMPLE_CHATS = (("user",), ("system", "user"))
"""Roles of sample chats; a chat template must accept at least one of them."""


@dataclass(frozen=True, slots=True)
class ModelText:
    """How a model's text is encoded and read.

    Attributes:
        tokenizer: the tokenizer, with its chat templates.
        defaults: what the model recommends for generation.
        format: how it writes calls and thoughts.
        vectors: how its vectors are made.
        scorer: scores queries and documents; None if nothing says how.
        labels: what it gives to texts if it is a classifier; None if it is none.
        warnings: what the server's operator should know, each in one line.
    """

    tokenizer: HFTokenizer
    defaults: GenerationDefaults
    format: ModelFormat
    vectors: VectorStyle
    scorer: Scorer | None
    labels: LabelDefaults | None = None

    @classmethod
    def load(cls, config: ServedModelConfig) -> Self:
        """Read the directory of the model that a configuration names.

        Raises:
            CheckpointError, ConfigError: a file cannot be used; one line with the fix.
        """
        directory = resolve_model_path(config.model)
        tokenizer = HFTokenizer.from_pretrained(directory, chat_template=read_chat_template(config))
        defaults = load_generation_defaults(directory)
        found = load_vector_defaults(directory)
        vectors = VectorStyle.of(config.embeddings, found)
        scorer = make_scorer(config.scoring, vectors, found, tokenizer)
        form = find_format(tokenizer, config.tool_parser, config.reasoning_parser)
        return cls(tokenizer, defaults, form, vectors, scorer, found.labels)

    @property
    def warnings(self) -> tuple[str, ...]:
        """See the class."""
        return (*self.defaults.warnings, *([self.format.warning] if self.format.warning is not None else []))

    def encoder(self, limits: LimitsConfig, info: EngineInfo) -> PromptEncoder:
        """What turns API requests into engine requests.

        Args:
            limits: bounds on what clients may do.
            info: what the engines accept.
        """
        grammars = GrammarCompiler(self.tokenizer, info.vocab_size)
        return PromptEncoder(self.tokenizer, self.defaults, info, limits, self.format, grammars)

    def check(self, config: ServedModelConfig, vocab_size: int) -> None:
        """Check that a text and a chat can be encoded for a model with this vocabulary size.

        Raises:
            ConfigError: they cannot; it names the file at fault.
        """
        info = EngineInfo(config.model_name, _ENDLESS, _ENDLESS, 1, 1, vocab_size, "", "", "")
        encoder = self.encoder(LimitsConfig(), info)
        try:
            encoder.inputs([_SAMPLE_TEXT])
        except APIError as error:
            raise ConfigError(f"{config.model}: does its tokenizer belong to this model? {error.message}") from error
        if not self.tokenizer.has_chat_template:
            return
        refusal = ""
        for roles in _SAMPLE_CHATS:
            messages = [{"role": role, "content": _SAMPLE_TEXT} for role in roles]
            chat = ChatRequest.model_validate({"model": config.model_name, "messages": messages})
            try:
                encoder.check_ids(encoder.prompt_ids(chat), "messages")
                return
            except (APIError, InvalidRequestError) as error:
                refusal = refusal or str(error)
        raise ConfigError(
            f"{self.tokenizer.template_origin}: the chat template cannot render a plain chat ({refusal}); correct "
            "it, or give another as chat_template"
        )
