"""Sampling state of each row, kept on the device between steps: the host writes a row when its sequence changes."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch

from llm.core.row_tensors import ROW_FIELDS, RowKind, RowTensors
from llm.core.uploads import Uploads
from llm.sampling.constraint import Int32Array, words_of
from llm.schemas import GenerationRequest


@dataclass(frozen=True, slots=True)
class RowStart:
    """The sampling state of a sequence that takes a row. The host knows all of its tokens at that time.

    Attributes:
        row: the row it takes.
        request: how to draw.
        prompt_ids: needed only for the repetition penalty.
        output_ids: needed only for penalties.
        end_ids: ids that must not be drawn before `request.min_new_tokens`.
        num_prompt_tokens: position at which the output begins.
    """

    row: int
    request: GenerationRequest
    prompt_ids: SequenceOf[int]
    output_ids: SequenceOf[int]
    end_ids: frozenset[int]
    num_prompt_tokens: int


class RowState:
    """Parameters, counts of tokens, biases, bans and bits of allowed ids, by row.

    The kernels of the draw read all of it, and count the tokens that they draw.

    Args:
        num_rows: number of rows, including those from which nothing is drawn.
        vocab_size: columns of the logits.
        device: of the tensors.
        uploads: how the host's values get to the device.

    Attributes:
        tensors: the tensors that the kernels read.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device, uploads: Uploads) -> None:
        self.vocab_size = vocab_size
        self._uploads = uploads
        self._mirror = np.zeros(num_rows, dtype=ROW_FIELDS)
        self._mirror["top_p"] = 1
        self.tensors = RowTensors.allocate(num_rows, vocab_size, device)

    def start(self, starts: SequenceOf[RowStart]) -> None:
        """Write the rows of new sequences, with copies that later kernels wait for."""
        if not starts:
            return
        for start in starts:
            request = start.request
            bans = start.end_ids if request.min_new_tokens else ()
            if request.logit_bias or bans:
                self._write_entries(start.row, list(request.logit_bias), list(request.logit_bias.values()), list(bans))
            if request.allowed_token_ids is not None:
                words = words_of(request.allowed_token_ids, self.vocab_size)
                self.bind([start.row], words[None])
            self._mirror[start.row] = (
                request.temperature, min(request.top_k or 0, 2**31 - 1), request.top_p, request.min_p,
                request.repetition_penalty, request.presence_penalty, request.frequency_penalty, row_kind(request),
                len(request.logit_bias), len(bans), start.num_prompt_tokens + request.min_new_tokens,
                _count_field(request.num_draw_logprobs), request.seed,
                _count_field(request.prompt_logprobs), request.scores_allowed,
            )  # fmt: skip
        sent = self._uploads.send(self._mirror.view(np.int32))
        self.tensors.fields.copy_(sent.view(self.tensors.fields.shape))
        penalised = [start for start in starts if start.request.uses_penalties]
        if penalised:
            self._count(penalised)

    def bind(self, rows: SequenceOf[int], words: torch.Tensor | Int32Array) -> None:
        """Set what these rows may draw from now on.

        Args:
            words: (rows, vocab_size / 32) int32, an array or memory from `Uploads.tensor`.
        """
        index = self._uploads.send(np.asarray(rows, dtype=np.int64))
        self.tensors.allowed.index_copy_(0, index, self._uploads.send(words))

    def _write_entries(self, row: int, ids: list[int], values: list[float], bans: list[int]) -> None:
        ids = ids + bans
        self.tensors.entry_ids[row, : len(ids)].copy_(self._uploads.send(np.asarray(ids, dtype=np.int32)))
        if values:
            sent = self._uploads.send(np.asarray(values, dtype=np.float32))
            self.tensors.entry_values[row, : len(values)].copy_(sent)

    def _count(self, starts: SequenceOf[RowStart]) -> None:
        """Count the tokens that these rows already have."""
        counts = self.tensors.counts.view(-1)
        rows = self._uploads.send(np.array([start.row for start in starts], dtype=np.int64))
        self.tensors.counts.index_fill_(0, rows, 0)
        prompts, outputs = (
            np.concatenate([start.row * self.vocab_size + np.asarray(ids, dtype=np.int64) for start, ids in parts])
            for parts in (
                [(start, start.prompt_ids) for start in starts],
                [(start, start.output_ids) for start in starts],
            )
        )
        if len(prompts):
            counts.index_fill_(0, self._uploads.send(prompts), 1)
        if len(outputs):
            index = self._uploads.send(outputs)
            counts.index_add_(0, index, torch.full_like(index, 2, dtype=torch.int32))


def _count_field(number: int | None) -> int:
    """How `ROW_FIELDS` writes a number that may be none."""
    return 0 if number is None else 1 + number


def row_kind(request: GenerationRequest) -> RowKind:
    """Which changes the logits of a request's draws need before its cuts."""
    kind = RowKind(0)
    if request.uses_penalties:
        kind |= RowKind.PENALISED
    if request.logit_bias or request.min_new_tokens:
        kind |= RowKind.HAS_ENTRIES
    if request.grammar is not None or request.allowed_token_ids is not None:
        kind |= RowKind.BOUND
    return kind
