"""Which pages rows get from step to step, as differences from what was sent before."""

from collections.abc import Sequence as SequenceOf

from llm.scheduling.sequence import Sequence, StepPart


class PageChanges:
    """Finds what page tables have to be told in each step. Only this class tracks what they have been told.

    Args:
        num_rows: rows of a table: those that the scheduler hands out, and one that is never read.
        table_len: pages of the longest sequence.
    """

    def __init__(self, num_rows: int, table_len: int) -> None:
        self._num_rows = num_rows
        self._table_len = table_len
        self._owners: list[Sequence | None] = [None] * num_rows
        self._num_preemptions = [0] * num_rows
        self._num_pages = [0] * num_rows

    def of(self, parts: SequenceOf[StepPart]) -> tuple[list[StepPart], list[int], list[int]]:
        """The changes of a step.

        Returns:
            The parts whose sequences are new at their rows; then places in the tables, (groups, rows, pages) flattened,
            and the pages to write there.
        """
        starting = []
        indices: list[int] = []
        pages: list[int] = []
        num_rows, table_len = self._num_rows, self._table_len
        for part in parts:
            row, sequence = part.row, part.sequence
            if self._owners[row] is not sequence or self._num_preemptions[row] != part.num_preemptions:
                self._owners[row], self._num_preemptions[row] = sequence, part.num_preemptions
                self._num_pages[row] = 0
                starting.append(part)
            num_pages, num_known = sequence.num_pages, self._num_pages[row]
            if num_pages > num_known:
                for group, group_pages in enumerate(sequence.pages):
                    first = (group * num_rows + row) * table_len
                    indices += range(first + num_known, first + num_pages)
                    pages += group_pages[num_known:]
                self._num_pages[row] = num_pages
        return starting, indices, pages
