"""What the device remembers of each running sequence from step to step."""

from collections.abc import Sequence as SequenceOf

import numpy as np
import numpy.typing as npt
import torch

from llm.core.row_tensors import ROW_FIELDS
from llm.core.uploads import Uploads
from llm.sampling.row_state import RowStart, RowState
from llm.scheduling.scheduler import StepPart
from llm.scheduling.sequence import Sequence
from llm.serving.page_changes import PageChanges

_MOST_NEW_TOKENS = 65_536
"""Tokens of a step, in prompts of rows with penalties or in new pages, for which memory is allocated at the start."""


class DevicePages:
    """Each row's pages and last token, as kernels read them.

    There is one row more than the scheduler hands out: `padding_row`, whose pages are the scratch page.

    Args:
        num_rows: rows that the scheduler hands out.
        max_pages: pages of the longest sequence.
        num_groups: groups of layers, each with its own page tables.
        scratch_page: page whose content is never read.

    Attributes:
        page_tables: (groups, rows, pages) int32.
        last_token_ids: (rows,) int32, written by the draw.
    """

    def __init__(self, num_rows: int, max_pages: int, num_groups: int, scratch_page: int, device: torch.device) -> None:
        self.padding_row = num_rows
        shape = num_groups, num_rows + 1, max_pages
        self.page_tables = torch.full(shape, scratch_page, dtype=torch.int32, device=device)
        self.last_token_ids = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)

    def write(self, indices: npt.ArrayLike, pages: npt.ArrayLike, uploads: Uploads) -> None:
        """Write pages into places of the tables, (groups, rows, pages) flattened; later kernels see them."""
        index, value = uploads.send(np.array([indices, pages], dtype=np.int64))
        self.page_tables.view(-1).index_copy_(0, index, value.int())


class DeviceRows:
    """Page tables, last tokens and sampling state by row, updated each step with only what changed.

    Args:
        pages: page tables and last tokens of the rows.
        vocab_size: columns of the logits.
        uploads: memory for the data that a step sends.

    Attributes:
        sampling: the state that draws depend on.
    """

    def __init__(self, pages: DevicePages, vocab_size: int, uploads: Uploads) -> None:
        _, num_rows, table_len = pages.page_tables.shape
        self.sampling = RowState(num_rows, vocab_size, pages.page_tables.device, uploads)
        self._pages = pages
        self._uploads = uploads
        self._changes = PageChanges(num_rows, table_len)

    def update(self, parts: SequenceOf[StepPart]) -> None:
        """Update the rows of a step's parts, with copies that later kernels wait for."""
        starting, indices, pages = self._changes.of(parts)
        if indices:
            self._pages.write(indices, pages, self._uploads)
        self.sampling.start([_start(part.row, part.sequence) for part in starting])


def make_uploads(num_rows: int, vocab_size: int, device: torch.device, num_buffers: int) -> Uploads:
    """Allocate memory for the data that a step with this many rows sends.

    Args:
        num_buffers: steps that may be in flight, plus one.
    """
    num_bytes = (num_rows + 1) * (ROW_FIELDS.itemsize + vocab_size // 8 + 8) + 8 * _MOST_NEW_TOKENS
    return Uploads(device, num_bytes, num_buffers)


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
