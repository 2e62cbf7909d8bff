"""From a request's body to what the engines run: tokenising, limits, sampling parameters."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from deployments.config import LimitsConfig
from deployments.engine_factory import EngineInfo
from deployments.openai.errors import APIError, invalid
from deployments.openai.schemas import ChatMessage, ChatRequest, CompletionRequest, SamplingFields
from llm.models.registry import GenerationDefaults
from llm.serving.schemas import INT64_MAX, GenerationRequest, new_seed
from llm.tokenization.hf_tokenizer import HFTokenizer

T = TypeVar("T")

DEFAULT_COMPLETION_TOKENS = 16
_INLINE_CHARS = 2_000
"""Texts up to this long are tokenised at once: handing them to a thread would take longer."""


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """Makes engine requests of API requests.

    Args:
        tokenizer: the checkpoint's.
        defaults: the checkpoint's recommended sampling, for what a request leaves open.
        info: the engines' context and pool.
        limits: bounds on requests.
        executor: where long texts are tokenised, so that the event loop goes on.
    """

    tokenizer: HFTokenizer
    defaults: GenerationDefaults
    info: EngineInfo
    limits: LimitsConfig
    executor: ThreadPoolExecutor

    async def chat(self, body: ChatRequest) -> list[GenerationRequest]:
        """One request for each of the `n` answers.

        Raises:
            APIError: a 400 that says which field is at fault.
            InvalidRequestError: the template refuses the messages.
        """
        variables = body.chat_template_kwargs or {}
        generation_prompt = body.add_generation_prompt is not False
        ids = await self.chat_ids(body.messages, add_generation_prompt=generation_prompt, variables=variables)
        self.check_length(ids, "messages")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return self._requests(body, [ids], body.most_tokens, logprobs, param=_chat_limit_name(body))

    async def completion(self, body: CompletionRequest) -> list[GenerationRequest]:
        """`n` requests for each prompt, those of a prompt side by side.

        Raises:
            APIError: a 400 that says which field is at fault.
        """
        prompts = _as_list(body.prompt)
        num_choices = len(prompts) * (body.n or 1)
        if num_choices > self.limits.max_choices:
            raise invalid(f"prompt: {num_choices} answers asked for; at most {self.limits.max_choices}", "prompt")
        batch = []
        for prompt in prompts:
            ids = await self.text_ids(prompt) if isinstance(prompt, str) else prompt
            self.check_length(ids, "prompt")
            self.check_ids(ids, "prompt")
            batch.append(ids)
        max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        return self._requests(body, batch, max_tokens, body.logprobs, param="max_tokens")

    async def text_ids(self, text: str, *, param: str = "prompt", add_special_tokens: bool = True) -> list[int]:
        """Tokens of a text, off the event loop unless it is short.

        Raises:
            APIError: it is past the context for certain; found without tokenising.
        """
        self._check_text(text, param)
        return await self.run(
            len(text), lambda: self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        )  # fmt: skip

    async def chat_ids(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool, variables: dict[str, Any]
    ) -> list[int]:
        """Tokens of a chat, off the event loop unless it is short.

        Raises:
            APIError: it is past the context for certain.
            InvalidRequestError: the template refuses it.
        """
        turns = [_turn(message) for message in messages]
        num_chars = sum(len(turn["content"]) + 20 for turn in turns)
        for turn in turns:
            self._check_text(turn["content"], "messages")
        return await self.run(
            num_chars + (_INLINE_CHARS if variables else 0),
            lambda: self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=add_generation_prompt, **_checked_variables(variables)
            ),
        )

    async def run(self, num_chars: int, work: Callable[[], T]) -> T:
        """Do work on a text of this length without holding up the event loop."""
        if num_chars <= _INLINE_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self.executor, work)

    def check_length(self, ids: Sequence[int], param: str) -> None:
        """Refuse what leaves no room for an answer, in the context or in the whole pool.

        Raises:
            APIError: it does.
        """
        if not ids:
            raise invalid(f"{param}: holds no tokens", param)
        most = min(self.info.max_seq_len, self.info.num_slots)
        if len(ids) >= most:
            raise _too_long(f"{len(ids)} tokens", most, param)

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Refuse ids that are not in the vocabulary.

        Raises:
            APIError: one is not.
        """
        if ids and max(ids) >= self.info.vocab_size:
            raise invalid(f"{param}: token ids must be below the vocabulary's {self.info.vocab_size}", param)

    def _check_text(self, text: str, param: str) -> None:
        most = min(self.info.max_seq_len, self.info.num_slots)
        if len(text) > most and self.tokenizer.min_num_tokens(text) >= most:
            raise _too_long(f"at least {self.tokenizer.min_num_tokens(text)} tokens", most, param)

    def _requests(
        self, body: SamplingFields, prompts: list[list[int]], max_tokens: int | None, logprobs: int | None, param: str
    ) -> list[GenerationRequest]:
        """Put sampling parameters and seeds to the prompts."""
        sampling = self._sampling(body)
        seed = new_seed() if body.seed is None else body.seed
        if max_tokens is not None and max_tokens > self.info.max_seq_len:
            raise invalid(f"{param}: at most the context length, {self.info.max_seq_len} tokens", param)
        n = body.n or 1
        requests = []
        for prompt in prompts:
            room = self.info.max_seq_len - len(prompt)
            most = room if max_tokens is None else min(max_tokens, room)
            fixed = {"prompt_token_ids": tuple(prompt), "max_new_tokens": most, "logprobs": logprobs, **sampling}
            fixed["min_new_tokens"] = min(sampling["min_new_tokens"], most)
            requests += [GenerationRequest(seed=_wrapped(seed + i), **fixed) for i in range(n)]
        return requests

    def _sampling(self, body: SamplingFields) -> dict[str, Any]:
        """Sampling parameters of the request, else the checkpoint's, else OpenAI's."""
        defaults = self.defaults
        top_k = defaults.top_k if body.top_k is None else body.top_k
        stop_ids, bias = body.stop_token_ids or [], body.logit_bias or {}
        self.check_ids(stop_ids, "stop_token_ids")
        self.check_ids(list(bias), "logit_bias")
        for text in body.stop_strings():
            if len(text) > self.limits.max_stop_chars:
                raise invalid(f"stop: at most {self.limits.max_stop_chars} characters each", "stop")
        return {
            "temperature": _first(body.temperature, defaults.temperature, 1.0),
            "top_p": _first(body.top_p, defaults.top_p, 1.0),
            "top_k": top_k if top_k is not None and top_k > 0 else None,
            "min_p": _first(body.min_p, 0.0),
            "presence_penalty": _first(body.presence_penalty, 0.0),
            "frequency_penalty": _first(body.frequency_penalty, 0.0),
            "repetition_penalty": _first(body.repetition_penalty, defaults.repetition_penalty, 1.0),
            "logit_bias": bias,
            "min_new_tokens": _first(body.min_tokens, 0),
            "stop_token_ids": tuple(stop_ids),
            "ignore_eos": bool(body.ignore_eos),
        }


def _too_long(what: str, most: int, param: str) -> APIError:
    return invalid(
        f"The prompt has {what}; this model's context is {most} tokens, the answer included",
        param,
        "context_length_exceeded",
    )


def _first(*values: Any) -> Any:
    """The first value that is given."""
    return next(value for value in values if value is not None)


def _wrapped(seed: int) -> int:
    """`seed` within 64 bits, past the largest on to the smallest."""
    return seed if seed <= INT64_MAX else seed - 2**64


def _as_list(prompt: Any) -> list[Any]:
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def _turn(message: ChatMessage) -> dict[str, Any]:
    """A message as chat templates know it."""
    # Templates know the older name of the role only.
    role = "system" if message.role == "developer" else message.role
    turn = {"role": role, "content": message.content or ""}
    return turn if message.name is None else {**turn, "name": message.name}


def _checked_variables(variables: dict[str, Any]) -> dict[str, Any]:
    if "add_generation_prompt" in variables or "messages" in variables or "tools" in variables:
        raise invalid("chat_template_kwargs: cannot set this variable", "chat_template_kwargs")
    return variables


def _chat_limit_name(body: ChatRequest) -> str:
    return "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
