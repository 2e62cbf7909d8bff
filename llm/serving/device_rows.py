"""What the device remembers of each running sequence from step to step."""

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch

from llm.core.row_tensors import ROW_FIELDS
from llm.core.uploads import Uploads
from llm.sampling.row_state import RowStart, RowState
from llm.scheduling.scheduler import StepPart
from llm.scheduling.sequence import Sequence

_MOST_NEW_TOKENS = 65_536
"""Of a step, in prompts of rows with penalties or in new pages, for which there is memory from the start."""


class DeviceRows:
    """Page tables, last tokens and what draws depend on, by row, kept up to date by difference.

    There is one row more than the scheduler gives out: `padding_row`, whose pages are the scratch page.

    Args:
        num_rows: rows that the scheduler gives out.
        max_pages: pages of the longest sequence.
        num_groups: of layers with page tables of their own.
        scratch_page: page whose content nobody reads.
        vocab_size: columns of the logits.
        num_buffers: steps that may be in flight, plus one.

    Attributes:
        page_tables: (groups, rows, pages) int32.
        last_token_ids: (rows,) int32, which the draw writes.
        sampling: what draws depend on.
        uploads: memory for what a step sends.
    """

    def __init__(
        self,
        num_rows: int,
        max_pages: int,
        num_groups: int,
        scratch_page: int,
        vocab_size: int,
        device: torch.device,
        num_buffers: int,
    ) -> None:
        self.padding_row = num_rows
        shape = num_groups, num_rows + 1, max_pages
        self.page_tables = torch.full(shape, scratch_page, dtype=torch.int32, device=device)
        self.last_token_ids = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
        num_bytes = (num_rows + 1) * (ROW_FIELDS.itemsize + vocab_size // 8 + 8) + 8 * _MOST_NEW_TOKENS
        self.uploads = Uploads(device, num_bytes, num_buffers)
        self.sampling = RowState(num_rows + 1, vocab_size, device, self.uploads)
        self._owners: list[Sequence | None] = [None] * num_rows
        self._num_preemptions = [0] * num_rows
        self._num_pages = [0] * num_rows

    def update(self, parts: SequenceOf[StepPart]) -> None:
        """Begin a step: bring the rows of its parts up to date, by copies that later kernels wait for."""
        self.uploads.begin_step()
        starts = []
        indices: list[int] = []
        pages: list[int] = []
        _, num_rows, table_len = self.page_tables.shape
        for part in parts:
            row, sequence = part.row, part.sequence
            if self._owners[row] is not sequence or self._num_preemptions[row] != part.num_preemptions:
                self._owners[row], self._num_preemptions[row] = sequence, part.num_preemptions
                self._num_pages[row] = 0
                starts.append(_start(row, sequence))
            num_pages, num_known = sequence.num_pages, self._num_pages[row]
            if num_pages > num_known:
                for group, group_pages in enumerate(sequence.pages):
                    first = (group * num_rows + row) * table_len
                    indices += range(first + num_known, first + num_pages)
                    pages += group_pages[num_known:]
                self._num_pages[row] = num_pages
        if indices:
            index, value = self.uploads.send(np.array([indices, pages], dtype=np.int64))
            self.page_tables.view(-1).index_copy_(0, index, value.int())
        self.sampling.start(starts)


def _start(row: int, sequence: Sequence) -> RowStart:
    request, num_prompt = sequence.request, sequence.num_prompt_tokens
    return RowStart(
        row,
        request,
        prompt_ids=sequence.tokens[:num_prompt] if request.repetition_penalty != 1 else (),
        output_ids=sequence.tokens[num_prompt:] if request.uses_penalties else (),
        end_ids=sequence.end_ids,
        num_prompt_tokens=num_prompt,
    )
