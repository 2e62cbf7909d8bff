"""`PageManager`: how many pages a sequence needs, which of them exist already, and when it gives them back."""

import sys

from llm.scheduling.sequence import Sequence
from llm.scheduling.slot_pool import SlotPool

_HASHES_PER_STEP = 768
"""Pages that the lookups of one step hash at most, about a millisecond's work: longer prompts take several steps."""
_PAGES_PER_HASH = 8
"""Pages found in the prefix cache that cost as much as hashing one."""
_NEVER = sys.maxsize


class PageManager:
    """Takes pages for sequences and gives them back, by what their tokens and the attention window need.

    It writes the `pages` and the `num_…_pages` of sequences, and the slot pool; nobody else does.

    Args:
        pool: the pages to hand out.
        window_size: number of tokens that each token attends to, itself included; pages wholly behind the window go
            back to the pool. None where every token attends to all before it.
        max_tokens_per_step: token budget of a step.
        enable_prefix_caching: share full pages between sequences that begin alike.
    """

    def __init__(
        self, pool: SlotPool, *, window_size: int | None, max_tokens_per_step: int, enable_prefix_caching: bool
    ) -> None:
        self.pool = pool
        self.window_size = window_size
        self.enable_prefix_caching = enable_prefix_caching
        self._max_tokens_per_step = max_tokens_per_step
        self._num_hashes_left = _HASHES_PER_STEP

    def begin_step(self) -> None:
        """Allow lookups as much hashing as a step may do."""
        self._num_hashes_left = _HASHES_PER_STEP

    def num_needed(self, num_tokens: int) -> int:
        """Most pages a sequence of `num_tokens` must hold: with a window, the window and one step's tokens.

        With plans in flight it may hold the tokens of these too, where the pool has room.
        """
        if self.window_size is not None:
            num_tokens = min(num_tokens, self.window_size + self._max_tokens_per_step + self.pool.page_size)
        return self.pool.pages_for(num_tokens)

    def num_owed(self, sequence: Sequence) -> int:
        """Pages that a running sequence will still take for tokens it has already."""
        num_held = len(sequence.pages) - sequence.num_dropped_pages
        return max(self.num_needed(sequence.num_tokens) - num_held, 0)

    def find_prefix(self, sequence: Sequence) -> list[int] | None:
        """Pages that hold a waiting sequence's first tokens already; never its last token, which must run to draw.

        None where it takes more hashing to know than this step may still do; a later step goes on from there.
        """
        if not self.enable_prefix_caching or sequence.needs_whole_prompt:
            return []
        num_tokens = len(sequence.tokens) - 1
        num_full = num_tokens // self.pool.page_size
        known = sequence.hashes.known
        if self.window_size is not None:
            return self._find_last_window(sequence, num_full)
        pages: list[int] = []
        while len(pages) < num_full:
            if self._num_hashes_left <= 0:
                return None
            if len(pages) == len(known):
                num_new = min(max(len(known), 1), self._num_hashes_left, num_full - len(known))
                self._num_hashes_left -= num_new
                sequence.hashes.extend(sequence.tokens, num_tokens, num_new)
            pages += self.pool.find_prefix(known[len(pages) : num_full])
            if len(pages) < min(len(known), num_full):
                break
        self._num_hashes_left -= len(pages) // _PAGES_PER_HASH
        return pages

    def _find_last_window(self, sequence: Sequence, num_full: int) -> list[int] | None:
        """The longest prefix whose last pages, all that a window reaches, are there; others may have been given up."""
        known = sequence.hashes.known
        if len(known) < num_full:
            num_new = min(num_full - len(known), self._num_hashes_left)
            self._num_hashes_left -= num_new
            sequence.hashes.extend(sequence.tokens, len(sequence.tokens) - 1, num_new)
            if len(known) < num_full:
                return None
        found = self.pool.find_each(known[:num_full])
        self._num_hashes_left -= num_full // _PAGES_PER_HASH
        first = num_pages = 0  # of the pages that are there without a gap
        for end, page in enumerate(found, 1):
            if page is None:
                first = end
            elif first <= self._num_behind_window(end * self.pool.page_size):
                num_pages = end
        num_behind = self._num_behind_window(num_pages * self.pool.page_size)
        scratch = self.pool.scratch_page
        return [scratch if page is None or i < num_behind else page for i, page in enumerate(found[:num_pages])]

    def admit(self, sequence: Sequence, prefix: list[int], num_available: int) -> int | None:
        """Give a waiting sequence the pages of its cached prefix, if the pool can hold all of its tokens.

        Args:
            sequence: it holds no pages.
            prefix: what `find_prefix` gave.
            num_available: pages of the pool that nobody else counts on.

        Returns:
            How many of these pages the sequence counts on; None if they are too few, and then nothing has changed.
        """
        num_behind = self._num_behind_window(len(prefix) * self.pool.page_size)
        shared = prefix[num_behind:]
        num_new = max(self.num_needed(len(sequence.tokens)) - len(shared), 0) + self.pool.count_cached(shared)
        if num_new > num_available:
            return None
        self.pool.share(shared)
        sequence.pages = [self.pool.scratch_page] * num_behind + shared
        sequence.num_dropped_pages = num_behind
        sequence.num_registered_pages = len(prefix)
        sequence.keep_at = 0
        return num_new

    def room(self, sequence: Sequence) -> int:
        """Tokens behind its computed ones that the pages of a sequence have room for."""
        return len(sequence.pages) * self.pool.page_size - sequence.num_computed

    def extend(self, sequence: Sequence, num_tokens: int, *, num_spared: int = 0) -> bool:
        """Take the pages that the next tokens of a running sequence lack; False, and none taken, if there are too few.

        Args:
            sequence: it has a row.
            num_tokens: tokens behind its computed ones.
            num_spared: pages of the pool that must stay available.
        """
        num_pages = self.pool.pages_for(sequence.num_computed + num_tokens) - len(sequence.pages)
        if num_pages > 0:
            if num_pages > self.pool.num_available - num_spared:
                return False
            sequence.pages += self.pool.allocate(num_pages)
        return True

    def will_drop(self, sequence: Sequence) -> bool:
        """Whether plans in flight will give back pages of this sequence that fall behind the window."""
        return self._num_behind_window(sequence.num_computed) > sequence.num_dropped_pages

    def keep(self, sequence: Sequence, num_tokens: int) -> None:
        """Now that the first `num_tokens` are stored: make full pages findable, and give back those behind the window.

        Later plans in flight attend from position `num_tokens` on, so they do not look at pages given back here. Sets
        `sequence.keep_at`: with fewer tokens than that there is nothing to do.
        """
        page_size = self.pool.page_size
        sequence.keep_at = _NEVER
        if self.enable_prefix_caching:
            num_full = num_tokens // page_size
            if num_full > sequence.num_registered_pages:
                hashes = sequence.hashes.extend(sequence.tokens, num_tokens)
                for index in range(sequence.num_registered_pages, num_full):
                    self.pool.register(sequence.pages[index], hashes[index])
                sequence.num_registered_pages = num_full
            sequence.keep_at = (sequence.num_registered_pages + 1) * page_size
        if self.window_size is not None:
            self._drop_behind_window(sequence, num_tokens)
            next_drop = (sequence.num_dropped_pages + 1) * page_size + self.window_size - 1
            sequence.keep_at = min(sequence.keep_at, next_drop)

    def release(self, sequence: Sequence) -> None:
        """Give back all pages of a sequence."""
        self.pool.release(sequence.pages[sequence.num_dropped_pages :])
        sequence.pages = []
        sequence.num_dropped_pages = sequence.num_registered_pages = 0

    def _drop_behind_window(self, sequence: Sequence, num_tokens: int) -> None:
        num_behind = self._num_behind_window(num_tokens)
        if num_behind > sequence.num_dropped_pages:
            behind = slice(sequence.num_dropped_pages, num_behind)
            self.pool.release(sequence.pages[behind])
            sequence.pages[behind] = [self.pool.scratch_page] * (num_behind - sequence.num_dropped_pages)
            sequence.num_dropped_pages = num_behind

    def _num_behind_window(self, num_computed: int) -> int:
        """Leading pages that no token from position `num_computed` on attends to."""
        if self.window_size is None:
            return 0
        return max(num_computed - self.window_size + 1, 0) // self.pool.page_size
