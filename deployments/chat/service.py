"""Turns an API request into a turn that is in progress."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from deployments.chat.encoder import EncodedChat, EncodedCompletion, PromptEncoder
from deployments.chat.errors import not_ready
from deployments.chat.model_text import ModelText
from deployments.chat.turn import Turn
from deployments.router.caller import Caller
from deployments.router.router import Router

T = TypeVar("T")

logger = logging.getLogger(__name__)

INLINE_BYTES = 2_000
"""Requests up to this size are read at once: handing them to a thread would take longer."""
_LONG_BYTES = 64 << 10


class ChatService:
    """Owns the tokenizer, prepares requests, and passes them to the router.

    Args:
        router: generates the answers.

    Raises:
        CheckpointError, ConfigError: the tokenizer cannot be loaded; one line with the fix.
    """

    def __init__(self, router: Router) -> None:
        self._text = ModelText.load(router.config)
        self.tokenizer, self._defaults = self._text.tokenizer, self._text.defaults
        for warning in self._text.warnings:
            logger.warning(warning)
        self._router = router
        self._threads = ThreadPoolExecutor(router.config.router.tokenizer_threads, thread_name_prefix="tokenizer")
        self._thread_for_long = ThreadPoolExecutor(1, thread_name_prefix="tokenizer-long")
        self._encoder: PromptEncoder | None = None

    @property
    def encoder(self) -> PromptEncoder:
        """Turns API requests into engine requests.

        Raises:
            APIError: a 503; no engine has reported its limits yet.
        """
        info, config = self._router.info, self._router.config
        if info is None:
            raise not_ready()
        if self._encoder is None:
            self._encoder = self._text.encoder(config, info)
        return self._encoder

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """Do work on a request of this size without holding up the event loop.

        Args:
            size: size of the request's body, in bytes.
            work: must hold the interpreter's lock for only a few milliseconds at a time.
        """
        if size <= INLINE_BYTES:
            return work()
        # A request that takes seconds must not keep short ones waiting.
        threads = self._threads if size <= _LONG_BYTES else self._thread_for_long
        return await asyncio.get_running_loop().run_in_executor(threads, work)

    async def chat(self, chat: EncodedChat, stop: Sequence[str], caller: Caller) -> Turn:
        """Begin to answer a chat.

        Raises:
            LLMError: see `Router.start`.
        """
        group = await self._router.start(chat.requests, caller)
        shown_ids = self.tokenizer.special_ids(chat.form.tags)
        return Turn(group, self.tokenizer, stop or self._defaults.stop_strings, chat.parser, shown_ids=shown_ids)

    async def completion(self, completion: EncodedCompletion, stop: Sequence[str], caller: Caller) -> Turn:
        """Begin to continue one or more prompts.

        Raises:
            LLMError: see `Router.start`.
        """
        group = await self._router.start(completion.requests, caller)
        return Turn(
            group,
            self.tokenizer,
            stop or self._defaults.stop_strings,
            echoes=completion.echoes,
            num_prompts=completion.num_prompts,
        )
