"""Snapshots, for the prefix cache, of the states of layers without keys and values: when they are taken and found.

Pages hold the keys and values of each token, but a state covers all tokens so far and cannot be cut back. So a prefix
is useful only up to a point where there is a snapshot of the state. Snapshots are large, and few are kept: one after a
prompt's last whole page, for a request that sends the prompt again or continues it; one where a prompt diverges from
one whose pages the cache has, because prompts have the part before that in common; and some along a long prompt.
"""

from collections.abc import Sequence as SequenceOf

import msgspec

from llm.scheduling.sequence import Sequence, StepPart
from llm.scheduling.slot_pool import SlotPool

_LEAST_PAGES = 4
"""Pages of the shortest prefix that has a snapshot: a shorter one is computed as fast as it is found."""
_PAGES_APART = 128
"""Least number of pages between snapshots along a long prompt."""


class StateSnapshots:
    """Hands out places for snapshots, and names each snapshot like the last page of its prefix.

    A place is free, used (a step in flight takes its snapshot) or cached. The least recently used is given up first,
    and a snapshot goes when its pages are given up. This class writes the `snapshot_…` fields of sequences and
    `restored_snapshot`; nothing else does.

    Args:
        num_snapshots: number of places, at least one; ids are 0 to `num_snapshots - 1`.
        pages: the attention layers' pool, with whose content snapshots are given up.
    """

    def __init__(self, num_snapshots: int, pages: SlotPool) -> None:
        self.places = SlotPool(num_snapshots, pages.page_size)
        self._page_size = pages.page_size
        pages.on_removal = self.places.drop

    def longest(self, hashes: SequenceOf[int]) -> int:
        """Largest number of leading pages, all of these or fewer, after which there is a snapshot."""
        find = self.places.find
        return next((end for end in range(len(hashes), 0, -1) if find(hashes[end - 1]) is not None), 0)

    def admit(self, sequence: Sequence, num_found: int) -> None:
        """Restore the snapshot after a sequence's cached pages, if it has any, and choose where to take new ones.

        Args:
            num_found: number of its pages that were found, as `longest` returned.
        """
        sequence.restored_snapshot = None
        if num_found:
            place = self.places.find(sequence.hashes.known[num_found - 1])
            assert place is not None, "found a moment ago"
            self.places.share([place])  # steps run in order: a later owner of the place writes to it later
            self.places.release([place])
            sequence.restored_snapshot = place
        size = self._page_size
        ends = {sequence.num_shared_pages * size, (len(sequence.tokens) - 1) // size * size}
        sequence.snapshot_ends = tuple(sorted(end for end in ends if end >= max(_LEAST_PAGES, num_found + 1) * size))
        sequence.last_snapshot = num_found * size

    def cut(self, sequence: Sequence, num_tokens: int) -> int:
        """How many of its next `num_tokens` tokens a sequence's next part should have, to end where that is useful."""
        start, end = sequence.num_computed, sequence.num_computed + num_tokens
        for wanted in sequence.snapshot_ends:
            if start < wanted <= end:
                return wanted - start
        whole = end // self._page_size * self._page_size
        return whole - start if sequence.snapshot_ends and start < whole < sequence.snapshot_ends[-1] else num_tokens

    def attach(self, part: StepPart) -> StepPart:
        """The part, which is in the next plan, with the snapshots that it begins from and leaves behind."""
        sequence, size = part.sequence, self._page_size
        restored, sequence.restored_snapshot = sequence.restored_snapshot, None
        saved = None
        is_far = part.end - sequence.last_snapshot >= _PAGES_APART * size
        if part.end % size == 0 and (part.end in sequence.snapshot_ends or (is_far and sequence.snapshot_ends)):
            saved = self._take(sequence, part.end)
        return part if restored is saved is None else msgspec.structs.replace(part, restored=restored, saved=saved)

    def keep(self, sequence: Sequence, num_tokens: int) -> None:
        """Make snapshots findable, now that the first `num_tokens` have run and their pages have names."""
        while sequence.snapshots_in_flight and sequence.snapshots_in_flight[0][0] <= num_tokens:
            end, place = sequence.snapshots_in_flight.pop(0)
            self.places.register(place, sequence.hashes.known[end // self._page_size - 1])
            self.places.release([place])

    def release(self, sequence: Sequence) -> None:
        """Give back the places of snapshots that will no longer be named."""
        self.places.release(place for _, place in sequence.snapshots_in_flight)
        sequence.snapshots_in_flight.clear()
        sequence.snapshot_ends, sequence.restored_snapshot = (), None

    def forget(self, sequence: Sequence) -> None:
        """Make the snapshots of this sequence's states impossible to find."""
        for content in sequence.hashes.known:
            self.places.drop(content)

    def _take(self, sequence: Sequence, end: int) -> int | None:
        """Take a place for the snapshot after the first `end` tokens; None if all are used."""
        if not self.places.num_available:
            return None
        (place,) = self.places.allocate(1)
        sequence.snapshots_in_flight.append((end, place))
        sequence.last_snapshot = end
        return place
