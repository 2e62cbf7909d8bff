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

    A step is scheduled before the tokens of the steps ahead of it are known, so a sequence may be longer than the host
    can tell: the tokens in flight stand behind `tokens`.

    The scheduler is the only writer; others read.

    Attributes:
        tokens: prompt and output so far, as far as the host has seen them.
        max_tokens: tokens at which the sequence ends, prompt and output together.
        num_in_flight: draws scheduled whose token the host has not seen.
        num_computed: leading tokens whose keys and values are in `pages`, or will be by a step already scheduled.
        num_preemptions: times it lost its pages; a step planned before the last one says nothing about `pages`.
        row: its place among the sequences that run, None while it does not.
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
        self.max_tokens = len(prompt_ids) + request.max_new_tokens
        self.status = SequenceStatus.WAITING
        self.num_in_flight = 0
        self.num_computed = 0
        self.num_preemptions = 0
        self.row: int | None = None
        self.pages: list[int] = []
        self.num_dropped_pages = 0
        self.num_registered_pages = 0
        self.num_cached_tokens: int | None = None
        self.hashes = PageHashes(page_size)
        self.end_ids = frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else eos_ids)
        """Ids that end this sequence."""
        self.uses_penalties = request.uses_penalties
        """Whether its draws depend on which tokens came before."""

    @property
    def request_id(self) -> str:
        """Id of the request."""
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far, tokens in flight included."""
        return len(self.tokens) + self.num_in_flight

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to be scheduled before the next one can be drawn."""
        return len(self.tokens) + self.num_in_flight - self.num_computed

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far as the host has seen them, those of an earlier engine included."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Token ids of the prompt."""
        return tuple(self.tokens[: self.num_prompt_tokens])

    @property
    def output_ids(self) -> list[int]:
        """Token ids generated so far."""
        return self.tokens[self.num_prompt_tokens :]

    def may_end_at(self, position: int) -> bool:
        """Whether the token at `position`, counted from the prompt's first, may end the sequence by a stop id."""
        return position - self.num_prompt_tokens >= self.request.min_new_tokens

    def finish_reason(self) -> FinishReason | None:
        """Whether the last token of `tokens` ends the sequence, and why."""
        num_tokens = len(self.tokens)
        if self.tokens[-1] in self.end_ids and self.may_end_at(num_tokens - 1):
            return FinishReason.STOP
        return FinishReason.LENGTH if num_tokens >= self.max_tokens else None
