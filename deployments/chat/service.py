"""From a request of an API to a turn that is under way."""

from concurrent.futures import ThreadPoolExecutor

from deployments.chat.encoder import PromptEncoder
from deployments.chat.errors import not_ready
from deployments.chat.model_format import find_format
from deployments.chat.requests import ChatRequest, CompletionRequest
from deployments.chat.turn import Turn
from deployments.router.caller import Caller
from deployments.router.router import Router
from llm.models.registry import load_generation_defaults, resolve_model_path
from llm.serving.grammar import GrammarCompiler
from llm.tokenization.hf_tokenizer import HFTokenizer


class ChatService:
    """Owns the tokenizer, and gives the router what it makes of requests.

    Args:
        router: generates.

    Raises:
        CheckpointError, ConfigError: the tokenizer cannot be loaded; one line with the fix.
    """

    def __init__(self, router: Router) -> None:
        directory = resolve_model_path(router.config.model)
        self.tokenizer = HFTokenizer.from_pretrained(directory)
        self._defaults = load_generation_defaults(directory)
        self._router = router
        self._executor = ThreadPoolExecutor(router.config.router.tokenizer_threads, thread_name_prefix="tokenizer")
        self._encoder: PromptEncoder | None = None

    @property
    def encoder(self) -> PromptEncoder:
        """Makes engine requests of API requests.

        Raises:
            APIError: 503, no engine has told its limits yet.
        """
        info, config = self._router.info, self._router.config
        if info is None:
            raise not_ready()
        if self._encoder is None:
            self._encoder = PromptEncoder(
                self.tokenizer,
                self._defaults,
                info,
                config.limits,
                self._executor,
                find_format(self.tokenizer, config.tool_parser, config.reasoning_parser),
                GrammarCompiler(self.tokenizer, info.vocab_size),
            )
        return self._encoder

    async def chat(self, body: ChatRequest, caller: Caller) -> Turn:
        """Begin to answer a chat.

        Raises:
            APIError, LLMError: see `PromptEncoder.chat` and `Router.start`.
        """
        chat = await self.encoder.chat(body)
        group = self._router.start(chat.requests, caller)
        return Turn(group, self.tokenizer, body.stop_strings(), chat.parser)

    async def completion(self, body: CompletionRequest, caller: Caller) -> Turn:
        """Begin to continue a prompt, or several.

        Raises:
            APIError, LLMError: see `PromptEncoder.completion` and `Router.start`.
        """
        encoder = self.encoder
        requests = await encoder.completion(body)
        echoes = await encoder.prompt_texts(body) if body.echo else ()
        group = self._router.start(requests, caller)
        num_prompts = len(requests) // body.num_answers
        return Turn(group, self.tokenizer, body.stop_strings(), echoes=echoes, num_prompts=num_prompts)
