"""Turns an API request into a turn that is in progress."""

import logging
from collections.abc import Sequence

from deployments.chat.encoder import EncodedChat, EncodedCompletion, PromptEncoder
from deployments.chat.errors import not_ready
from deployments.chat.model_text import ModelText
from deployments.chat.turn import Turn
from deployments.router.caller import Caller
from deployments.router.router import Router
from llm.serving.schemas import AdapterRef

logger = logging.getLogger(__name__)


class ChatService:
    """Owns the tokenizer of one model, and passes prepared requests to the model's router.

    Args:
        router: generates the answers.

    Raises:
        CheckpointError, ConfigError: the tokenizer cannot be loaded; one line with the fix.
    """

    def __init__(self, router: Router) -> None:
        self._text = ModelText.load(router.config)
        self.tokenizer, self._defaults = self._text.tokenizer, self._text.defaults
        self.vectors, self.scorer, self.labels = self._text.vectors, self._text.scorer, self._text.labels
        for warning in self._text.warnings:
            logger.warning(warning)
        self.router = router
        self._encoder: PromptEncoder | None = None

    @property
    def encoder(self) -> PromptEncoder:
        """Turns API requests into engine requests.

        Raises:
            APIError: a 503; no engine has reported its limits yet.
        """
        info = self.router.info
        if info is None:
            raise not_ready()
        if self._encoder is None:
            self._encoder = self._text.encoder(self.router.platform.limits, info)
        return self._encoder

    async def chat(
        self, chat: EncodedChat, stop: Sequence[str], caller: Caller, adapter: AdapterRef | None = None
    ) -> Turn:
        """Begin to answer a chat, with an adapter or the model itself.

        Raises:
            LLMError: see `Router.start`.
        """
        group = await self.router.start(chat.requests, caller, adapter)
        shown_ids = self.tokenizer.special_ids(chat.form.tags)
        return Turn(group, self.tokenizer, stop or self._defaults.stop_strings, chat.parser, shown_ids=shown_ids)

    async def completion(
        self, completion: EncodedCompletion, stop: Sequence[str], caller: Caller, adapter: AdapterRef | None = None
    ) -> Turn:
        """Begin to continue one or more prompts, with an adapter or the model itself.

        Raises:
            LLMError: see `Router.start`.
        """
        group = await self.router.start(completion.requests, caller, adapter)
        return Turn(
            group,
            self.tokenizer,
            stop or self._defaults.stop_strings,
            echoes=completion.echoes,
            num_prompts=completion.num_prompts,
        )
