"""What the device remembers of each running sequence from step to step."""

import numpy as np
import torch

from llm.core.row_tensors import ROW_FIELDS
from llm.core.uploads import Uploads
from llm.sampling.row_state import RowStart
from llm.scheduling.sequence import Sequence
from llm.serving.step_arrays import Int32Array

_MOST_NEW_TOKENS = 65_536
"""Tokens of a step, in prompts of rows with penalties or in new pages, for which memory is allocated at the start."""


class DevicePages:
    """Each row's pages and last token, as kernels read them.

    There is one row more than the scheduler hands out: `padding_row`, whose pages are the scratch page.

    Args:
        num_rows: rows that the scheduler hands out.
        table_len: pages of the longest sequence.
        num_groups: groups of layers, each with its own page tables.
        scratch_page: page whose content is never read.

    Attributes:
        page_tables: (groups, rows, pages) int32.
        last_token_ids: (rows,) int32, written by the draw.
    """

    def __init__(self, num_rows: int, table_len: int, num_groups: int, scratch_page: int, device: torch.device) -> None:
        self.padding_row = num_rows
        shape = num_groups, num_rows + 1, table_len
        self.page_tables = torch.full(shape, scratch_page, dtype=torch.int32, device=device)
        self.last_token_ids = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)

    def write(self, places: Int32Array, pages: Int32Array, uploads: Uploads) -> None:
        """Write pages to places of the tables, (groups, rows, pages) flattened; later kernels see them."""
        index, value = uploads.send(np.array([places, pages], dtype=np.int64))
        self.page_tables.view(-1).index_copy_(0, index, value.int())


def make_uploads(num_rows: int, vocab_size: int, device: torch.device, num_buffers: int) -> Uploads:
    """Allocate memory for the data that a step with this many rows sends.

    Args:
        num_buffers: steps that may be in flight, plus one.
    """
    num_bytes = (num_rows + 1) * (ROW_FIELDS.itemsize + vocab_size // 8 + 8) + 8 * _MOST_NEW_TOKENS
    return Uploads(device, num_bytes, num_buffers)


def row_start(row: int, sequence: Sequence) -> RowStart:
    """The sampling state of a sequence that takes this row."""
    request, num_prompt = sequence.request, sequence.num_prompt_tokens
    return RowStart(
        row,
        request,
        prompt_ids=sequence.tokens[:num_prompt] if request.repetition_penalty != 1 else (),
        output_ids=sequence.tokens[num_prompt:] if request.uses_penalties else (),
        end_ids=sequence.end_ids,
        num_prompt_tokens=num_prompt,
    )
