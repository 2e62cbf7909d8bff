"""`StepPacker`: turns a plan into what runners take, with the pages of rows as differences from the step before."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from llm.scheduling.sequence import Sequence, StepPart
from llm.serving.step_arrays import StepArrays


@dataclass(frozen=True, slots=True)
class PackedPlan:
    """A step as runners take it.

    Attributes:
        parts: the plan's parts, at least one.
        starting: those of them whose sequences are new at their rows.
        arrays: all of the step that the model and other ranks need.
    """

    parts: SequenceOf[StepPart]
    starting: SequenceOf[StepPart]
    arrays: StepArrays


class StepPacker:
    """Packs each step once, for all ranks, in the order in which they are launched.

    Only this class tracks what page tables have been told.

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

    def pack(self, parts: SequenceOf[StepPart]) -> PackedPlan:
        """Pack a plan's parts. Everything on the host is read before this returns (tokens, pages, requests)."""
        starting = []
        places: list[int] = []
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
                    places += range(first + num_known, first + num_pages)
                    pages += group_pages[num_known:]
                self._num_pages[row] = num_pages
        return PackedPlan(parts, starting, StepArrays.of(parts, places, pages))
