"""What the device remembers of each running sequence from step to step."""

from collections.abc import Sequence as SequenceOf
from itertools import cycle

import numpy as np
import torch

from llm.kernels.sampling import RowSampling
from llm.scheduling.scheduler import ScheduledSequence
from llm.scheduling.sequence import Sequence

_MOST_NEW_PAGES = 4096
"""Of a step, for which there is memory from the start."""


class DeviceRows:
    """Page tables, last tokens and sampling parameters by row, kept up to date by difference.

    There is one row more than the scheduler gives out: `padding_row`, whose pages are the scratch page.

    Args:
        num_rows: rows that the scheduler gives out.
        max_pages: pages of the longest sequence.
        scratch_page: page whose content nobody reads.
        num_buffers: steps that may be in flight, plus one.
    """

    def __init__(
        self, num_rows: int, max_pages: int, scratch_page: int, device: torch.device, num_buffers: int
    ) -> None:
        self.padding_row = num_rows
        self.page_tables = torch.full((num_rows + 1, max_pages), scratch_page, dtype=torch.int32, device=device)
        self.last_token_ids = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
        pin = device.type == "cuda"
        self._parameters = torch.zeros(6, num_rows + 1, dtype=torch.int32, device=device)
        self._host_parameters = cycle(
            [torch.zeros(6, num_rows + 1, dtype=torch.int32, pin_memory=pin) for _ in range(num_buffers)]
        )
        # Pinned memory that is only allocated when it is needed makes the device and the host wait for each other.
        self._host_pages = cycle(
            [torch.zeros(2 * _MOST_NEW_PAGES, dtype=torch.int64, pin_memory=pin) for _ in range(num_buffers)]
        )
        self._mirror = np.zeros((6, num_rows + 1), dtype=np.int32)
        self._owners: list[Sequence | None] = [None] * num_rows
        self._num_preemptions = [0] * num_rows
        self._num_pages = [0] * num_rows

    @property
    def sampling(self) -> RowSampling:
        """Sampling parameters, as views of one tensor."""
        seeds = self._parameters[4:].view(-1).view(torch.int64)
        floats = self._parameters.view(torch.float32)
        return RowSampling(
            temperature=floats[0], top_k=self._parameters[1], top_p=floats[2], min_p=floats[3], seed=seeds
        )

    def update(self, parts: SequenceOf[ScheduledSequence]) -> None:
        """Bring the rows of these parts up to date, by copies that later kernels wait for."""
        new_rows = []
        indices: list[int] = []
        pages: list[int] = []
        table_len = self.page_tables.shape[1]
        for part in parts:
            row, sequence = part.row, part.sequence
            if self._owners[row] is not sequence or self._num_preemptions[row] != part.num_preemptions:
                self._owners[row], self._num_preemptions[row] = sequence, part.num_preemptions
                self._num_pages[row] = 0
                new_rows.append((row, sequence))
            num_pages = len(sequence.pages)
            if num_pages > self._num_pages[row]:
                first, num_known = row * table_len, self._num_pages[row]
                indices += range(first + num_known, first + num_pages)
                pages += sequence.pages[num_known:]
                self._num_pages[row] = num_pages
        if indices:
            self._write_pages(indices, pages)
        if new_rows:
            self._write_parameters(new_rows)

    def _write_pages(self, indices: list[int], pages: list[int]) -> None:
        buffer, size = next(self._host_pages), 2 * len(indices)
        if size > len(buffer):  # a long cached prefix, say
            buffer = torch.empty(size, dtype=torch.int64, pin_memory=self.page_tables.is_cuda)
        host = buffer[:size].view(2, -1)
        host.numpy()[:] = indices, pages
        index, value = host.to(self.page_tables.device, non_blocking=True)
        self.page_tables.view(-1).index_copy_(0, index, value.int())

    def _write_parameters(self, new_rows: list[tuple[int, Sequence]]) -> None:
        floats, seeds = self._mirror.view(np.float32), self._mirror[4:].reshape(-1).view(np.int64)
        for row, sequence in new_rows:
            request = sequence.request
            floats[0, row], floats[2, row], floats[3, row] = request.temperature, request.top_p, request.min_p
            self._mirror[1, row] = min(request.top_k or 0, 2**31 - 1)
            seeds[row] = request.seed
        host = next(self._host_parameters)
        host.numpy()[:] = self._mirror
        self._parameters.copy_(host, non_blocking=True)
