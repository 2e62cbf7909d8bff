"""A sum of hidden states for each row, kept on the device for sequences that are pooled or classified."""

from collections.abc import Callable, Sequence as SequenceOf
from functools import cached_property

import numpy as np
import torch

from llm.core.uploads import Uploads
from llm.kernels.pooling import add_states
from llm.models.decoder import DecoderModel
from llm.scheduling.sequence import StepPart
from llm.serving.model_runner import vector_bytes


class VectorRows:
    """Sums hidden states by row and copies complete vectors to the host.

    Args:
        num_rows: rows that the scheduler hands out, and one that is never read.
        model: gives the hidden states; if it is a classifier, the vectors are the logits of its labels.
        uploads: how the host's values get to the device.
        num_buffers: steps that may be in flight, plus one.
    """

    def __init__(self, num_rows: int, model: DecoderModel, uploads: Uploads, num_buffers: int) -> None:
        self._sums = torch.zeros(num_rows, model.hidden_size, dtype=torch.float32, device=model.device)
        self._size = model.config.num_labels or model.hidden_size
        self._to_logits = None if model.config.classifier is None else model.logits
        self._uploads = uploads
        self._num_buffers = num_buffers
        self._next = 0

    @cached_property
    def _host_vectors(self) -> list[torch.Tensor]:
        pin = self._sums.is_cuda
        shape = len(self._sums), self._size
        return [torch.empty(shape, dtype=torch.float32, pin_memory=pin) for _ in range(self._num_buffers)]

    def warm_up(self, hidden: torch.Tensor) -> None:
        """Compile the kernel, on a row that is never read, and run a classifier's head."""
        parts = torch.zeros(4, 1, dtype=torch.int32, device=self._sums.device)
        parts[1] = len(self._sums) - 1
        add_states(hidden, parts, self._sums)
        self._vectors()

    def _vectors(self) -> torch.Tensor:
        """The vectors of all rows, normalized or not. A product of one size gives a row the same bits each time."""
        return self._sums if self._to_logits is None else self._to_logits(self._sums)

    def add(self, parts: SequenceOf[StepPart], hidden: torch.Tensor) -> Callable[[], dict[int, bytes]]:
        """Add a step's hidden states to their vectors; does not wait for the device.

        Args:
            parts: the step's parts.
            hidden: (pooled tokens or more, hidden_size), the parts' pooled tokens first, in order.

        Returns:
            A function that returns the complete vectors by row, to be called once the step has finished.
        """
        pooled = [part for part in parts if part.num_pooled]
        if not pooled:
            return dict
        self._next = (self._next + 1) % self._num_buffers
        lens = np.array([part.num_pooled for part in pooled], dtype=np.int32)
        rows = [part.row for part in pooled]
        begins = [part.begins_vector for part in pooled]
        sent = self._uploads.send(np.array([lens.cumsum() - lens, rows, lens, begins], dtype=np.int32))
        add_states(hidden, sent, self._sums)
        host = self._host_vectors[self._next][: len(pooled)]
        host.copy_(self._vectors().index_select(0, sent[1]), non_blocking=True)
        completed = [i for i, part in enumerate(pooled) if part.completes_vector]
        normalizes = self._to_logits is None
        return lambda: vector_bytes(host[completed], [rows[i] for i in completed], normalizes=normalizes)
