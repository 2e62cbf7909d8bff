"""`PageManager`: how many pages a sequence needs, which of them already exist, and when it gives them back."""

import sys
from bisect import bisect_right
from collections.abc import Sequence as SequenceOf

from llm.scheduling.sequence import Sequence
from llm.scheduling.slot_pool import GROUP_BITS, SlotPool
from llm.scheduling.state_snapshots import StateSnapshots

_HASHES_PER_STEP = 768
"""Most pages that the lookups of one step hash, about a millisecond's work: longer prompts take several steps."""
_PAGES_PER_HASH = 8
"""Number of page lookups in the prefix cache that cost as much as hashing one page."""
_NEVER = sys.maxsize


class PageManager:
    """Takes pages for sequences and gives them back, as their tokens and the attention windows require.

    Layers form groups (`llm.core.page_groups`), and a sequence has a list of pages for each group, all equally long:
    pages at the same place of each list hold the same tokens. They are taken for all groups or for none.

    It writes the `pages` and the `num_…_pages` of sequences, and the slot pool; nothing else does.

    Args:
        pool: the pages to hand out; any group may take them.
        windows: for each group the number of tokens that each token attends to, itself included; pages wholly outside
            it go back to the pool. None if every token attends to all before it. Such groups come first.
        max_tokens_per_step: token budget of a step.
        enable_prefix_caching: share full pages between sequences that begin with the same tokens.
        snapshots: of layers with states, without which no page is useful to another sequence; None for a model without
            such layers. If there are any, no group has a window.
    """

    def __init__(
        self,
        pool: SlotPool,
        *,
        windows: SequenceOf[int | None],
        max_tokens_per_step: int,
        enable_prefix_caching: bool,
        snapshots: StateSnapshots | None = None,
    ) -> None:
        self.pool = pool
        self.enable_prefix_caching = enable_prefix_caching
        self._windows = list(enumerate(windows))
        self._num_groups = len(self._windows)
        self._num_whole = sum(window is None for window in windows)
        """Number of groups whose tokens attend to all before them."""
        assert snapshots is None or self._num_whole == self._num_groups, "no window beside states"
        self._snapshots = snapshots
        self._max_tokens_per_step = max_tokens_per_step
        self._num_hashes_left = _HASHES_PER_STEP

    def begin_step(self) -> None:
        """Reset the amount of hashing that lookups may do in a step."""
        self._num_hashes_left = _HASHES_PER_STEP

    def num_needed(self, num_tokens: int) -> int:
        """Most pages that a sequence of `num_tokens` must hold: with a window, the window and one step's tokens.

        With plans in flight it may also hold the tokens of these, if the pool has room.
        """
        return sum(self._num_needed_by(window, num_tokens) for _, window in self._windows)

    def most_tokens(self, max_tokens: int) -> int:
        """Length of the longest sequence that the pool holds if it runs alone, at most `max_tokens`; 0 for none."""
        if self.num_needed(max_tokens) <= self.pool.num_pages:
            return max_tokens
        page_size = self.pool.page_size
        ends = range(page_size, max_tokens + page_size, page_size)
        return min(page_size * bisect_right(ends, self.pool.num_pages, key=self.num_needed), max_tokens)

    def num_owed(self, sequence: Sequence) -> int:
        """Pages that a running sequence will still take for tokens it already has."""
        num_tokens = sequence.num_tokens
        return sum(
            max(self._num_needed_by(window, num_tokens) - len(pages) + num_dropped, 0)
            for (_, window), pages, num_dropped in zip(
                self._windows, sequence.pages, sequence.num_dropped_pages, strict=True
            )
        )

    def find_prefix(self, sequence: Sequence) -> list[list[int]] | None:
        """Find the pages that already hold a waiting sequence's first tokens; never its last, which must run to draw.

        Returns:
            A list for each group, all equally long, with the scratch page in place of pages outside a window. None if
            finding out takes more hashing than this step may still do; a later step continues from there.
        """
        sequence.num_shared_pages = 0
        if not self.enable_prefix_caching or sequence.needs_whole_prompt:
            return [[] for _ in self._windows]
        num_tokens = len(sequence.tokens) - 1
        found = self._find_whole(sequence, num_tokens) if self._num_whole else self._hash_all(sequence, num_tokens)
        if found is not None and self._snapshots is not None:
            num_pages = sequence.num_shared_pages = len(found[0])
            num_pages = self._snapshots.longest(sequence.hashes.known[:num_pages])
            return [pages[:num_pages] for pages in found]
        if found is None or self._num_whole == self._num_groups:
            return found
        return self._find_windows(sequence.hashes.known, found)

    def admit(self, sequence: Sequence, prefix: list[list[int]], num_available: int) -> int | None:
        """Give a waiting sequence the pages of its cached prefix if the pool can hold all of its tokens.

        Args:
            sequence: it holds no pages.
            prefix: what `find_prefix` returned.
            num_available: pages of the pool that no other sequence counts on.

        Returns:
            How many of these pages the sequence counts on; None if there are too few, and then nothing has changed.
        """
        num_found, num_new, behind = len(prefix[0]), 0, []
        for group, window in self._windows:
            num_behind = self._num_behind(window, num_found * self.pool.page_size)
            num_new += max(self._num_needed_by(window, len(sequence.tokens)) - num_found + num_behind, 0)
            if num_found:
                num_new += self.pool.count_cached(prefix[group][num_behind:])
            behind.append(num_behind)
        if num_new > num_available:
            return None
        if num_found:
            for pages, num_behind in zip(prefix, behind, strict=True):
                self.pool.share(pages[num_behind:])
        sequence.pages = prefix
        sequence.num_dropped_pages = behind
        sequence.num_registered_pages = num_found
        sequence.keep_at = 0
        if self._snapshots is not None:
            self._snapshots.admit(sequence, num_found)
        return num_new

    def room(self, sequence: Sequence) -> int:
        """Number of tokens after its computed ones for which a sequence's pages have room."""
        return sequence.num_pages * self.pool.page_size - sequence.num_computed

    def extend(self, sequence: Sequence, num_tokens: int, *, num_spared: int = 0) -> bool:
        """Take the pages that a running sequence's next tokens need; False, and none taken, if there are too few.

        Args:
            sequence: it has a row.
            num_tokens: number of tokens after its computed ones.
            num_spared: pages of the pool that must stay available.
        """
        num_pages = self.pool.pages_for(sequence.num_computed + num_tokens) - sequence.num_pages
        if num_pages > 0:
            if num_pages * self._num_groups > self.pool.num_available - num_spared:
                return False
            for pages in sequence.pages:
                pages += self.pool.allocate(num_pages)
        return True

    def will_drop(self, sequence: Sequence) -> bool:
        """Whether plans in flight will give back pages of this sequence that fall out of a window."""
        return any(
            self._num_behind(window, sequence.num_computed) > sequence.num_dropped_pages[group]
            for group, window in self._windows[self._num_whole :]
        )

    def keep(self, sequence: Sequence, num_tokens: int) -> None:
        """Make full pages findable now that the first `num_tokens` are stored, and give back those outside the windows.

        Later plans in flight attend from position `num_tokens` on, so they do not read pages given back here. Sets
        `sequence.keep_at`: with fewer tokens than that there is nothing to do.
        """
        page_size = self.pool.page_size
        sequence.keep_at = _NEVER
        if self.enable_prefix_caching:
            num_full = num_tokens // page_size
            if num_full > sequence.num_registered_pages:
                hashes = sequence.hashes.extend(sequence.tokens, num_tokens)
                for group, _ in self._windows:
                    pages, bits = sequence.pages[group], group << GROUP_BITS
                    for index in range(sequence.num_registered_pages, num_full):
                        self.pool.register(pages[index], hashes[index] | bits)
                sequence.num_registered_pages = num_full
                if self._snapshots is not None:
                    self._snapshots.keep(sequence, num_tokens)
            sequence.keep_at = (sequence.num_registered_pages + 1) * page_size
        for group, window in self._windows[self._num_whole :]:
            assert window is not None, "those without come first"
            self._drop_behind(sequence, group, self._num_behind(window, num_tokens))
            next_drop = (sequence.num_dropped_pages[group] + 1) * page_size + window - 1
            sequence.keep_at = min(sequence.keep_at, next_drop)

    def release(self, sequence: Sequence) -> None:
        """Give back all pages of a sequence."""
        for pages, num_dropped in zip(sequence.pages, sequence.num_dropped_pages, strict=True):
            self.pool.release(pages[num_dropped:])
        if self._snapshots is not None:
            self._snapshots.release(sequence)
        sequence.pages, sequence.num_dropped_pages = [], []
        sequence.num_registered_pages = 0

    def forget(self, sequence: Sequence) -> None:
        """Remove the content of a sequence's pages from the prefix cache."""
        for pages in sequence.pages:
            self.pool.forget(pages)
        if self._snapshots is not None:
            self._snapshots.forget(sequence)

    def _find_whole(self, sequence: Sequence, num_tokens: int) -> list[list[int]] | None:
        """Find the longest prefix that all groups without a window hold: the pages of each of these groups."""
        num_full = num_tokens // self.pool.page_size
        known = sequence.hashes.known
        found: list[list[int]] = [[] for _ in range(self._num_whole)]
        while len(found[0]) < num_full:
            if self._num_hashes_left <= 0:
                return None
            num_pages = len(found[0])
            if num_pages == len(known):
                num_new = min(max(len(known), 1), self._num_hashes_left, num_full - len(known))
                self._num_hashes_left -= num_new
                sequence.hashes.extend(sequence.tokens, num_tokens, num_new)
            for group, pages in enumerate(found):
                pages += self.pool.find_prefix(self._names(known[num_pages:num_full], group))
            num_pages = min(map(len, found))
            if self._num_whole > 1:
                found = [pages[:num_pages] for pages in found]
            if num_pages < min(len(known), num_full):
                break
        self._num_hashes_left -= self._num_whole * len(found[0]) // _PAGES_PER_HASH
        return found

    def _hash_all(self, sequence: Sequence, num_tokens: int) -> list[list[int]] | None:
        """Hash the whole prompt, since if every group has a window its first pages may be gone; finds no pages yet."""
        num_new = min(num_tokens // self.pool.page_size - len(sequence.hashes.known), self._num_hashes_left)
        if num_new > 0:
            self._num_hashes_left -= num_new
            sequence.hashes.extend(sequence.tokens, num_tokens, num_new)
        return [] if len(sequence.hashes.known) >= num_tokens // self.pool.page_size else None

    def _find_windows(self, known: list[int], whole: list[list[int]]) -> list[list[int]]:
        """Find the longest prefix of which groups with a window also hold the last pages that the window reaches."""
        page_size, scratch = self.pool.page_size, self.pool.scratch_page
        num_pages = len(whole[0]) if whole else len(known)
        found = [self.pool.find_each(self._names(known[:num_pages], group)) for group, _ in self._windows[len(whole) :]]
        windows = [window for _, window in self._windows[len(whole) :]]
        self._num_hashes_left -= len(found) * num_pages // _PAGES_PER_HASH
        firsts, best = [0] * len(found), 0  # first of the pages that are there without a gap
        for end in range(1, num_pages + 1):
            for i, pages in enumerate(found):
                if pages[end - 1] is None:
                    firsts[i] = end
            if all(
                first <= self._num_behind(window, end * page_size) and first < end
                for first, window in zip(firsts, windows, strict=True)
            ):
                best = end
        prefix = [pages[:best] for pages in whole]
        for window, pages in zip(windows, found, strict=True):
            num_behind = self._num_behind(window, best * page_size)
            prefix.append([scratch if page is None or i < num_behind else page for i, page in enumerate(pages[:best])])
        return prefix

    def _names(self, hashes: list[int], group: int) -> list[int]:
        """Names under which the pool registers the pages of a group."""
        return [content | group << GROUP_BITS for content in hashes] if group else hashes

    def _num_needed_by(self, window: int | None, num_tokens: int) -> int:
        if window is not None:
            num_tokens = min(num_tokens, window + self._max_tokens_per_step + self.pool.page_size)
        return self.pool.pages_for(num_tokens)

    def _drop_behind(self, sequence: Sequence, group: int, num_behind: int) -> None:
        """Give back a group's first pages, except those already given back."""
        num_dropped, pages = sequence.num_dropped_pages[group], sequence.pages[group]
        if num_behind > num_dropped:
            self.pool.release(pages[num_dropped:num_behind])
            pages[num_dropped:num_behind] = [self.pool.scratch_page] * (num_behind - num_dropped)
            sequence.num_dropped_pages[group] = num_behind

    def _num_behind(self, window: int | None, num_computed: int) -> int:
        """Leading pages that no token from position `num_computed` on attends to."""
        return 0 if window is None else max(num_computed - window + 1, 0) // self.pool.page_size
