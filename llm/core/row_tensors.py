"""What the draws of each row depend on, as tensors that kernels read; `llm.sampling.row_state` writes them."""

from dataclasses import dataclass
from enum import IntFlag
from typing import Self

import numpy as np
import torch

MAX_ENTRIES = 2048
"""Biases and banned ids of one row, together."""


class RowKind(IntFlag):
    """What a row's logits go through before its cuts, if anything."""

    PENALISED = 1
    HAS_ENTRIES = 2
    """Biases, or ids that must not be drawn."""
    BOUND = 4
    """There are bits for the ids that may be drawn."""


ROW_FIELDS = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("repetition_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("kind", np.int32),
        ("num_biases", np.int32),
        ("num_bans", np.int32),
        ("banned_before", np.int32),
        ("num_logprobs", np.int32),
        ("seed", np.int64),
        ("num_prompt_logprobs", np.int32),
        ("are_top_allowed", np.int32),
    ]
)
"""One row's parameters, 16 words of 32 bits. As in `GenerationRequest`, but: `top_k` is 0 for off; `banned_before`
is the position from which the banned ids may be drawn; `num_logprobs` and `num_prompt_logprobs` are one more than was
asked for, 0 for none; `are_top_allowed` is 1 if only allowed ids count among the likeliest of a draw."""


@dataclass(frozen=True, slots=True)
class RowTensors:
    """Parameters, counts of tokens, biases, bans and bits of allowed ids, by row.

    Attributes:
        fields: (rows, 16) int32, each row a `ROW_FIELDS`.
        counts: (rows, vocab_size) int32, written for rows with penalties only: twice how often the output holds the id,
            plus 1 if the prompt does.
        entry_ids: (rows, MAX_ENTRIES) int32: `num_biases` ids that are biased, then `num_bans` that are banned.
        entry_values: (rows, MAX_ENTRIES) float32, what is added to the logits of the first.
        allowed: (rows, vocab_size / 32) int32, a bit an id, the lowest of the first word first; for bound rows only.
    """

    fields: torch.Tensor
    counts: torch.Tensor
    entry_ids: torch.Tensor
    entry_values: torch.Tensor
    allowed: torch.Tensor

    @classmethod
    def allocate(cls, num_rows: int, vocab_size: int, device: torch.device) -> Self:
        """Rows of no kind."""
        return cls(
            fields=torch.zeros(num_rows, ROW_FIELDS.itemsize // 4, dtype=torch.int32, device=device),
            counts=torch.zeros(num_rows, vocab_size, dtype=torch.int32, device=device),
            entry_ids=torch.zeros(num_rows, MAX_ENTRIES, dtype=torch.int32, device=device),
            entry_values=torch.zeros(num_rows, MAX_ENTRIES, dtype=torch.float32, device=device),
            allowed=torch.full((num_rows, -(-vocab_size // 32)), -1, dtype=torch.int32, device=device),
        )
