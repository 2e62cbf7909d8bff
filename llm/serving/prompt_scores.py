"""Log probabilities of prompt tokens, computed on a GPU beside the draws of a step."""

from collections.abc import Callable, Sequence as SequenceOf
from functools import cached_property

import numpy as np
import torch

from llm.core.row_tensors import RowTensors
from llm.core.uploads import Uploads
from llm.kernels.logprobs import LogprobWorkspace, find_logprobs
from llm.kernels.sampling import DrawnTokens
from llm.scheduling.sequence import Sequence, StepPart
from llm.schemas import TokenLogprobs
from llm.serving.step_arrays import batches

Scores = list[tuple[Sequence, list[TokenLogprobs]]]


class PromptScores:
    """Computes log probabilities of prompt tokens and copies them to the host. Allocates nothing until it is needed.

    Args:
        max_tokens: tokens of the largest step.
        at_once: tokens for whose logits there is memory, and room in `workspace`.
        to_logits: hidden states (tokens, hidden_size) → logits (tokens, vocab_size).
        rows: what the sequences request.
        workspace: workspace of the draws, which run before or after.
        uploads: how the host's values get to the device.
        num_buffers: steps that may be in flight, plus one.
    """

    def __init__(
        self,
        max_tokens: int,
        at_once: int,
        to_logits: Callable[[torch.Tensor], torch.Tensor],
        rows: RowTensors,
        workspace: LogprobWorkspace,
        uploads: Uploads,
        num_buffers: int,
    ) -> None:
        self._max_tokens = max_tokens
        self._at_once = at_once
        self._to_logits = to_logits
        self._rows = rows
        self._workspace = workspace
        self._uploads = uploads
        self._num_buffers = num_buffers
        self._next = 0

    @cached_property
    def _on_device(self) -> DrawnTokens:
        return DrawnTokens.allocate(self._max_tokens, self._rows.fields.device)

    @cached_property
    def _on_host(self) -> list[DrawnTokens]:
        pin = self._rows.fields.is_cuda
        return [DrawnTokens.allocate(self._max_tokens, "cpu", pin_memory=pin) for _ in range(self._num_buffers)]

    def find(self, parts: SequenceOf[StepPart], hidden: torch.Tensor) -> Callable[[], Scores]:
        """Compute a step's log probabilities; does not wait for the device.

        Args:
            parts: the step's parts.
            hidden: (scored tokens or more, hidden_size), the parts' scored tokens first, in order.

        Returns:
            A function that returns them, to be called once the step has finished.
        """
        scored = [part for part in parts if part.num_scored]
        if not scored:
            return list
        lens = [part.num_scored for part in scored]
        num_scored = sum(lens)
        rows = np.repeat(np.array([part.row for part in scored], dtype=np.int32), lens)
        targets = np.concatenate([np.array(part.scored_ids, dtype=np.int32) for part in scored])
        sent = self._uploads.send(np.stack([rows, targets]))
        for part in batches(num_scored, self._at_once):
            find_logprobs(
                self._to_logits(hidden[part]), sent[0, part], sent[1, part], self._rows, self._workspace,
                self._on_device.logprobs[part], of_prompts=True,
            )  # fmt: skip
        self._next = (self._next + 1) % self._num_buffers
        host = self._on_host[self._next]
        host.logprobs[:num_scored].copy_(self._on_device.logprobs[:num_scored], non_blocking=True)
        return lambda: self._entries(scored, targets.tolist(), host)

    def _entries(self, scored: SequenceOf[StepPart], targets: list[int], host: DrawnTokens) -> Scores:
        scores: Scores = []
        first, vocab_size = 0, self._rows.counts.shape[1]
        for part in scored:
            num_top = min(part.sequence.request.prompt_logprobs or 0, vocab_size)
            indices = range(first, first + part.num_scored)
            entries = [TokenLogprobs(targets[i], *host.logprobs_of(i, num_top)) for i in indices]
            scores.append((part.sequence, entries))
            first += part.num_scored
        return scores
