"""How a batch's lines reach the models: as requests like any other, made on behalf of the batch's owner."""

from dataclasses import dataclass
from typing import Protocol

_RETRIED = frozenset({429, 503})
"""The server is too busy, or is about to stop; the same request may succeed later."""


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """The answer to a line.

    Attributes:
        status: of HTTP.
        body: JSON.
        retry_after_s: when to try again, if the answer says so.
    """

    status: int
    body: bytes
    retry_after_s: float | None = None

    @property
    def is_success(self) -> bool:
        """Whether the line has been answered."""
        return 200 <= self.status < 300

    @property
    def is_worth_another_try(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status in _RETRIED


class LineCalls(Protocol):
    """Answers lines."""

    async def call(self, owner: str, url: str, body: bytes, request_id: str) -> LineAnswer:
        """The answer to a request of this API key; whatever goes wrong is an answer too. Cancelling gives it up."""
        ...


@dataclass(frozen=True, slots=True)
class Spare:
    """What a model's replicas could take on now without keeping anybody waiting.

    Attributes:
        num_lines: requests.
        num_prompt_tokens: tokens of their prompts.
    """

    num_lines: int
    num_prompt_tokens: float


class Capacity(Protocol):
    """Knows how busy the replicas are."""

    def spare(self, model: str | None, max_row_use: float) -> Spare:
        """What is idle now.

        Args:
            model: the name in a request; None for the default model.
            max_row_use: share of the rows up to which batches may fill them.
        """
        ...
