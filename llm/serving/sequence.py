"""`Sequence`: one request as the engine runs it."""

from enum import Enum, auto

from llm.core.prefix_cache import PageHashes
from llm.serving.schemas import FinishReason, GenerationRequest


class SequenceStatus(Enum):
    """Where a sequence stands. Preemption leads from RUNNING back to WAITING."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """Tokens of one request and the pages that hold their keys and values.

    Neither prefill nor decode is a state: a sequence always has `num_uncomputed` tokens to run through the model, one
    while it decodes, many while its prompt (or, after preemption, all of it) is computed. A token is drawn in the step
    that computes the last of them.

    The scheduler is the only writer; others read.

    Attributes:
        tokens: prompt and output so far.
        num_computed: leading tokens whose keys and values are in `pages`.
        pages: page ids in order of position; a page that fell behind the window is replaced by the scratch page.
        num_dropped_pages: leading pages that fell behind the window.
        num_registered_pages: leading pages whose content is registered in the pool.
        num_cached_tokens: prompt tokens found in the prefix cache when the sequence was first admitted, None before.
    """

    def __init__(
        self, request: GenerationRequest, prompt_ids: tuple[int, ...], eos_ids: frozenset[int], page_size: int
    ) -> None:
        self.request = request
        self.num_prompt_tokens = len(prompt_ids)
        self.tokens = [*prompt_ids, *request.output_token_ids]
        self.status = SequenceStatus.WAITING
        self.num_computed = 0
        self.pages: list[int] = []
        self.num_dropped_pages = 0
        self.num_registered_pages = 0
        self.num_cached_tokens: int | None = None
        self.hashes = PageHashes(page_size)
        self.end_ids = frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else eos_ids)
        """Ids that end this sequence."""

    @property
    def request_id(self) -> str:
        """Id of the request."""
        return self.request.request_id

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to run through the model before the next one can be drawn."""
        return len(self.tokens) - self.num_computed

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, those of an earlier engine included."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Token ids of the prompt."""
        return tuple(self.tokens[: self.num_prompt_tokens])

    @property
    def output_ids(self) -> list[int]:
        """Token ids generated so far."""
        return self.tokens[self.num_prompt_tokens :]

    @property
    def may_end(self) -> bool:
        """Whether the next token may end the sequence by a stop id or end of sequence."""
        return self.num_output_tokens >= self.request.min_new_tokens

    def finish_reason(self, max_seq_len: int) -> FinishReason | None:
        """Whether the token drawn last ends the sequence, and why."""
        if self.tokens[-1] in self.end_ids and self.num_output_tokens > self.request.min_new_tokens:
            return FinishReason.STOP
        if self.num_output_tokens >= self.request.max_new_tokens or len(self.tokens) >= max_seq_len:
            return FinishReason.LENGTH
        return None
