"""Turns a request's body into what the engines run: tokenizing, limits, sampling parameters."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deployments.channel.messages import EngineInfo
from deployments.chat.errors import PromptTooLongError, invalid
from deployments.chat.labels import check_generates
from deployments.chat.messages import ChatMessage
from deployments.chat.model_format import ModelFormat, prompt_reasoning
from deployments.chat.output import OutputParser
from deployments.chat.parsers import AnswerForm, make_parser, preamble_of
from deployments.chat.requests import ChatRequest, CompletionRequest, SamplingFields
from deployments.chat.structured import grammar_error, grammar_of
from deployments.chat.template_turns import render_turns
from deployments.chat.tools import arguments_schema, forced_grammar, strict_grammar
from deployments.config import LimitsConfig
from deployments.model_config import ToolParserName
from llm.checkpoint.generation_defaults import GenerationDefaults
from llm.errors import InvalidRequestError
from llm.sampling.grammar import GrammarCompiler
from llm.serving.schemas import INT64_MAX, GenerationRequest, Grammar, GrammarKind, new_request_id, new_seed
from llm.tokenization.hf_tokenizer import HFTokenizer

DEFAULT_COMPLETION_TOKENS = 16
_MOST_TOKENS = 2**31 - 1
"""Largest limit that a request may set. A limit larger than the room left in the context, which clients that do not
know the context often set, means that room."""
_SUPPRESSED = -1e9
"""Bias with which a token is never drawn, unless a grammar allows nothing else."""


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """A chat as the engines run it.

    Attributes:
        requests: one for each answer.
        form: how to read the answers.
    """

    requests: list[GenerationRequest]
    form: AnswerForm

    def parser(self) -> OutputParser:
        """A parser for one of the answers."""
        return make_parser(self.form)


@dataclass(frozen=True, slots=True)
class EncodedCompletion:
    """Prompts to be continued as the engines run them.

    Attributes:
        requests: one for each answer; those of the same prompt are adjacent.
        num_prompts: how many prompts there are.
        echoes: what each prompt's answers begin with; empty if they echo nothing.
    """

    requests: list[GenerationRequest]
    num_prompts: int
    echoes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """Turns API requests into engine requests. Thread-safe; prepare long requests in a thread.

    Args:
        tokenizer: the checkpoint's.
        defaults: the checkpoint's recommended sampling, for parameters that a request does not set.
        info: the engines' context and pool.
        limits: bounds on requests.
        format: how the model writes calls and thoughts.
        grammars: says which grammars the engines can follow.
    """

    tokenizer: HFTokenizer
    defaults: GenerationDefaults
    info: EngineInfo
    limits: LimitsConfig
    format: ModelFormat
    grammars: GrammarCompiler

    def chat(self, body: ChatRequest) -> EncodedChat:
        """One request for each of the `n` answers, and how to read them.

        Raises:
            APIError: a 400 that says which field is at fault.
            InvalidRequestError: the template refuses the messages.
        """
        check_generates(self.info)
        ids = self.prompt_ids(body)
        self.check_ids(ids, "messages")
        self.check_length(ids, "messages")
        bound = grammar_of(body)
        calls = self._calls_grammar(body)
        is_forced = calls is not None and calls.kind is not GrammarKind.CALLS
        if is_forced and bound is not None:
            raise invalid(f"{bound[0]}: a tool_choice that forces a call leaves no room for it", bound[0])
        form = self._form(body, ids, is_forced=is_forced, is_bound=bound is not None)
        grammar = self._compiled(("tools", calls) if calls is not None and bound is None else bound, form)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        requests = self._requests(body, [ids], body.most_tokens, logprobs, _chat_limit_name(body), grammar, body.n or 1)
        return EncodedChat(requests, form)

    def _calls_grammar(self, body: ChatRequest) -> Grammar | None:
        """What calls in the answers must look like; None if no call is required and no tool is strict.

        Raises:
            APIError: a strict tool's schema cannot be followed.
        """
        tools, may_be_many = body.tools or [], body.parallel_tool_calls is not False
        grammar = forced_grammar(tools, body.tool_choice, may_be_many=may_be_many)
        if grammar is None and body.tool_choice != "none" and self.format.markup is not None:
            grammar = strict_grammar(tools, self.format.markup, may_be_many=may_be_many)
        if grammar is not None:
            for i, tool in enumerate(tools):
                if tool.function.strict:
                    schema = Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(arguments_schema(tool)))
                    self._compiled((f"tools[{i}].function.parameters", schema))
        return grammar

    def _form(self, body: ChatRequest, ids: list[int], *, is_forced: bool, is_bound: bool) -> AnswerForm:
        """How to read the answers to a request."""
        tools = body.tools or []
        tool_parser = self.format.tool_parser if tools and body.tool_choice != "none" and not is_bound else None
        if is_forced:
            tool_parser = tool_parser or ToolParserName.LLAMA3
        reasoning = self.format.reasoning_parser
        is_reasoning = prompt_reasoning(self.tokenizer, reasoning, ids)
        if body.continue_final_message and not is_reasoning:
            reasoning = None  # the answer has begun, so the thoughts have ended
        return AnswerForm(
            tool_parser,
            is_forced,
            reasoning,
            is_reasoning,
            {tool.function.name: tool.function.parameters or {} for tool in tools},
        )

    def prompt_ids(self, body: ChatRequest) -> list[int]:
        """Tokens of a chat request's prompt.

        Raises:
            APIError, InvalidRequestError: as in `chat`.
        """
        tools = body.tools or []
        if tools and body.tool_choice in (None, "auto") and not self.format.is_teaching:
            raise invalid(
                "tools: this model's chat template does not support tools; only tool_choice can force a call, unless "
                "the server's operator gives a chat_template that does",
                "tools",
            )
        return self.chat_ids(
            body.messages,
            add_generation_prompt=body.add_generation_prompt is not False,
            variables={**body.thinking_variables(), **(body.chat_template_kwargs or {})},
            tools=[] if body.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in tools],
            is_continued=bool(body.continue_final_message),
        )

    def completion(self, body: CompletionRequest) -> EncodedCompletion:
        """`num_answers` requests for each prompt.

        Raises:
            APIError: a 400 that says which field is at fault.
        """
        check_generates(self.info)
        prompts = _as_list(body.prompt)
        num_choices = len(prompts) * body.num_answers
        if num_choices > self.limits.max_choices:
            raise invalid(f"prompt: {num_choices} answers asked for; at most {self.limits.max_choices}", "prompt")
        batch = self._batch(prompts, "prompt")
        for ids in batch:
            self.check_length(ids, "prompt")
        max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        grammar = self._compiled(grammar_of(body))
        logprobs = body.logprobs
        if logprobs is None and body.num_answers > (body.n or 1):
            logprobs = 0  # they determine the best answers
        requests = self._requests(body, batch, max_tokens, logprobs, "max_tokens", grammar, body.num_answers)
        return EncodedCompletion(requests, len(prompts), self._prompt_texts(prompts) if body.echo else ())

    def _prompt_texts(self, prompts: Sequence[str | list[int]]) -> list[str]:
        """Each prompt as text; special tokens in prompts of ids are left out."""
        return [prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt) for prompt in prompts]

    def inputs(self, inputs: Sequence[str | list[int]], param: str = "input") -> list[list[int]]:
        """Tokens of each input to be embedded.

        Raises:
            APIError: a 400.
        """
        batch = self._batch(inputs, param)
        for ids in batch:
            self.check_length(ids, param)
        return batch

    def text_ids(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokens of a text.

        Raises:
            APIError: it certainly exceeds the context, which is found without tokenizing.
        """
        self.check_text(text, "prompt")
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _batch(self, given: Sequence[str | list[int]], param: str) -> list[list[int]]:
        """Tokens of texts, or the tokens that were given.

        Raises:
            APIError: a text certainly exceeds the context, or an id is not in the vocabulary.
        """
        texts = [text for text in given if isinstance(text, str)]
        for text in texts:
            self.check_text(text, param)
        encoded = iter(self.tokenizer.encode_all(texts))
        batch = [next(encoded) if isinstance(item, str) else item for item in given]
        for ids in batch:
            self.check_ids(ids, param)
        return batch

    def chat_ids(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool,
        variables: dict[str, Any],
        tools: Sequence[dict[str, Any]] = (),
        is_continued: bool = False,
    ) -> list[int]:
        """Tokens of a chat; see `render_turns`.

        Raises:
            APIError: it certainly exceeds the context, which is found without tokenizing.
            InvalidRequestError: the template refuses it.
        """
        chat = render_turns(
            self.tokenizer,
            self.format.history.messages([message.turn() for message in messages]),
            is_continued=is_continued,
            add_generation_prompt=add_generation_prompt,
            tools=self.format.history.tools(tools),
            **_checked_variables(variables),
        )
        self.check_text(chat.text, "messages")
        return self.tokenizer.encode_chat(chat)

    @property
    def most_prompt_tokens(self) -> int:
        """Most tokens of a prompt, in the context and in the whole pool; one more is left for the answer."""
        return min(self.info.max_seq_len, self.info.num_slots) - 1

    def check_length(self, ids: Sequence[int], param: str) -> None:
        """Refuse a prompt that leaves no room for an answer, in the context or in the whole pool.

        Raises:
            APIError: it leaves no room.
        """
        if not ids:
            raise invalid(f"{param}: holds no tokens", param)
        if len(ids) > self.most_prompt_tokens:
            raise PromptTooLongError(str(len(ids)), self.most_prompt_tokens + 1, param)

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Refuse ids that are not in the vocabulary.

        Raises:
            APIError: one is not.
        """
        if ids and max(ids) >= self.info.vocab_size:
            raise invalid(f"{param}: token ids must be below the vocabulary's {self.info.vocab_size}", param)

    def check_text(self, text: str, param: str) -> None:
        """Refuse a text that certainly exceeds the context, which is found without tokenizing.

        Raises:
            APIError: it does.
        """
        most = self.most_prompt_tokens
        if len(text) > most and self.tokenizer.min_num_tokens(text) > most:
            raise PromptTooLongError(f"at least {self.tokenizer.min_num_tokens(text)}", most + 1, param)

    def _compiled(self, bound: tuple[str, Grammar] | None, form: AnswerForm | None = None) -> Grammar | None:
        """The grammar, after checking that the engines can follow it; in a chat it applies after the thoughts.

        Raises:
            APIError: the grammar is wrong; the error names its field.
        """
        if bound is None:
            return None
        param, grammar = bound
        if form is not None and grammar.preamble is None:
            preamble = preamble_of(form, may_call=grammar.kind is GrammarKind.CALLS)
            grammar = grammar.model_copy(update={"preamble": preamble})
        try:
            self.grammars.compile(grammar)
        except InvalidRequestError as error:
            raise grammar_error(error, param) from None
        return grammar

    def _requests(
        self,
        body: SamplingFields,
        prompts: list[list[int]],
        max_tokens: int | None,
        logprobs: int | None,
        param: str,
        grammar: Grammar | None,
        num_answers: int,
    ) -> list[GenerationRequest]:
        """Add sampling parameters and seeds to the prompts."""
        for name in ("ignore_eos", "min_tokens", "allowed_token_ids"):
            if grammar is not None and getattr(body, name):
                raise invalid(f"{name}: the answer's format says which tokens may come and where it ends", name)
        sampling = self._sampling(body)
        seed = new_seed() if body.seed is None else body.seed
        if max_tokens is not None and max_tokens > _MOST_TOKENS:
            raise invalid(f"{param}: at most {_MOST_TOKENS}", param)
        requests = []
        for prompt in prompts:
            room = self.info.max_seq_len - len(prompt)
            most = min(_first(max_tokens, self.defaults.max_new_tokens, room), room)
            fixed = {"prompt_token_ids": tuple(prompt), "max_new_tokens": most, "logprobs": logprobs, **sampling}
            fixed["grammar"] = grammar
            fixed["prompt_logprobs"] = body.num_prompt_logprobs
            fixed["min_new_tokens"] = min(sampling["min_new_tokens"], most) if grammar is None else 0
            requests += _copies(GenerationRequest(seed=seed, **fixed), num_answers)
        return requests

    def _sampling(self, body: SamplingFields) -> dict[str, Any]:
        """Sampling parameters of the request; where not set, the checkpoint's; otherwise OpenAI's."""
        defaults = self.defaults
        top_k = defaults.top_k if body.top_k is None else body.top_k
        stop_ids, bias = body.stop_token_ids or [], body.logit_bias or {}
        self.check_ids(stop_ids, "stop_token_ids")
        self.check_ids(list(bias), "logit_bias")
        self.check_ids(body.allowed_token_ids or [], "allowed_token_ids")
        for text in body.stop_strings():
            if len(text) > self.limits.max_stop_chars:
                raise invalid(f"stop: at most {self.limits.max_stop_chars} characters each", "stop")
        return {
            "temperature": 0.0 if body.top_p == 0 else _first(body.temperature, defaults.temperature, 1.0),
            "top_p": _first(body.top_p or None, defaults.top_p, 1.0),
            "top_k": top_k if top_k is not None and top_k > 0 else None,
            "min_p": _first(body.min_p, defaults.min_p, 0.0),
            "presence_penalty": _first(body.presence_penalty, 0.0),
            "frequency_penalty": _first(body.frequency_penalty, 0.0),
            "repetition_penalty": _first(body.repetition_penalty, defaults.repetition_penalty, 1.0),
            "logit_bias": {**dict.fromkeys(defaults.suppress_tokens, _SUPPRESSED), **bias},
            "allowed_token_ids": tuple(body.allowed_token_ids) if body.allowed_token_ids else None,
            "min_new_tokens": _first(body.min_tokens, defaults.min_new_tokens, 0),
            "stop_token_ids": tuple(stop_ids),
            "ignore_eos": bool(body.ignore_eos),
            "cache_salt": body.cache_salt or "",
        }


def _first(*values: Any) -> Any:
    """The first value that is given."""
    return next(value for value in values if value is not None)


def _copies(request: GenerationRequest, number: int) -> list[GenerationRequest]:
    """Requests for several answers, the i-th with seed + i; after the largest seed comes the smallest.

    They share the prompt object: checking and comparing a long prompt again for each answer would take seconds.
    """
    seeds = (request.seed + i for i in range(1, number))
    others = [
        request.model_copy(update={"request_id": new_request_id(), "seed": s if s <= INT64_MAX else s - 2**64})
        for s in seeds
    ]
    return [request, *others]


def _as_list(prompt: Any) -> list[Any]:
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def _checked_variables(variables: dict[str, Any]) -> dict[str, Any]:
    if "add_generation_prompt" in variables or "messages" in variables or "tools" in variables:
        raise invalid("chat_template_kwargs: cannot set this variable", "chat_template_kwargs")
    return variables


def _chat_limit_name(body: ChatRequest) -> str:
    return "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
