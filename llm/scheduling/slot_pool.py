"""Tracks which pages of the KV memory are in use. Counting only: `PagedKVCache` has the tensors."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import cast

from llm.errors import CapacityError

GROUP_BITS = 128
"""Names of content are 128-bit hashes; the index of the layer group is in the bits above."""


@dataclass(slots=True)
class ContentChanges:
    """Content of the first group of layers that a pool has registered or given up since the last look.

    The other groups are left out: they hold the same tokens, and no prefix is found without the first.
    """

    added: set[int] = field(default_factory=set)
    removed: set[int] = field(default_factory=set)

    def add(self, content: int) -> None:
        """Record that the content is registered."""
        if content >> GROUP_BITS:
            return
        if content in self.removed:
            self.removed.remove(content)
        else:
            self.added.add(content)

    def remove(self, content: int) -> None:
        """Record that the content has been given up."""
        if content >> GROUP_BITS:
            return
        if content in self.added:
            self.added.remove(content)
        else:
            self.removed.add(content)


class SlotPool:
    """Hands out pages of slots, shares them and keeps them for their content.

    A page is free (no content worth keeping), used (by one sequence or, shared, by several), or cached (by none, but
    its content may serve a later prompt). Cached pages are given up, least recently used first, when free ones run
    out. The scheduler is the only writer.

    Args:
        num_pages: total number of pages; ids are 0 to `num_pages - 1`.
        page_size: slots per page; a slot holds one token's keys and values in every layer of one group.

    Attributes:
        on_removal: called with each content that is given up or forgotten; None for no call. The pool's owner sets it.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = deque(range(num_pages))
        self._num_users = [0] * num_pages
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._content: dict[int, int] = {}
        self._page_of: dict[int, int] = {}
        self._changes: ContentChanges | None = None
        self.on_removal: Callable[[int], None] | None = None

    @property
    def scratch_page(self) -> int:
        """Id of a page after the last that belongs to no sequence: what is written there is never read."""
        return self.num_pages

    @property
    def num_free(self) -> int:
        """Pages without content."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages that hold content but that no sequence uses."""
        return len(self._cached)

    @property
    def content(self) -> Iterable[int]:
        """All registered content, used or cached."""
        return self._page_of.keys()

    @property
    def num_used(self) -> int:
        """Pages that at least one sequence uses."""
        return self.num_pages - self.num_free - self.num_cached

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out now."""
        return self.num_free + self.num_cached

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` slots."""
        return -(-num_tokens // self.page_size)

    def allocate(self, num_pages: int) -> list[int]:
        """Take pages for one user, giving up cached content if necessary.

        Raises:
            CapacityError: fewer than `num_pages` are available. Nothing is taken.
        """
        if num_pages > self.num_available:
            raise CapacityError(f"{num_pages} pages asked for, {self.num_available} of {self.num_pages} available")
        return [self._take_one() for _ in range(num_pages)]

    def release(self, pages: Iterable[int]) -> None:
        """Give pages back. One with registered content and no user left becomes cached; any other becomes free.

        Pass pages in the order of the sequence: its last ones are then given up first, and its head stays longest.
        """
        num_users, content = self._num_users, self._content
        for page in reversed(list(pages)):
            num_left = num_users[page] - 1
            assert num_left >= 0, f"page {page} released more often than taken"
            num_users[page] = num_left
            if not num_left:
                if page in content:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def register(self, page: int, content: int) -> None:
        """Record what a used page holds, so that `share` finds it. A second page with that content stays private."""
        assert self._num_users[page] > 0, f"page {page} is registered by nobody who uses it"
        if content not in self._page_of:
            self._page_of[content] = page
            self._content[page] = content
            if self._changes is not None:
                self._changes.add(content)

    def forget(self, pages: Iterable[int]) -> None:
        """Record that used pages do not hold their registered content. They can no longer be found."""
        for page in pages:
            content = self._content.pop(page, None)
            if content is not None:
                assert self._num_users[page] > 0, f"page {page} is forgotten by nobody who uses it"
                self._remove(content)

    def drop(self, content: int) -> None:
        """Give up content that no sequence uses; does nothing if there is no such content."""
        page = self._page_of.get(content)
        if page is not None and page in self._cached:
            del self._cached[page], self._content[page]
            self._remove(content)
            self._free.append(page)

    def find(self, content: int) -> int | None:
        """The page that holds `content`, used or cached, or None. Changes nothing."""
        return self._page_of.get(content)

    def find_each(self, contents: Iterable[int]) -> list[int | None]:
        """The page that holds each of `contents`, None where none does. Changes nothing."""
        return list(map(self._page_of.get, contents))

    def find_prefix(self, contents: Iterable[int]) -> list[int]:
        """The pages that hold `contents` in order, up to the first content that no page holds. Changes nothing."""
        pages = self.find_each(contents)
        return cast(list[int], pages[: pages.index(None)] if None in pages else pages)

    def count_cached(self, pages: Iterable[int]) -> int:
        """How many of these pages have content and no user."""
        return sum(map(self._cached.__contains__, pages))

    def share(self, pages: Iterable[int]) -> None:
        """Become one more user of pages that `find` or `find_prefix` returned."""
        num_users, cached = self._num_users, self._cached
        for page in pages:
            if not num_users[page]:
                del cached[page]
            num_users[page] += 1

    def take_changes(self) -> ContentChanges:
        """What has been registered and given up since the last call; the first call returns everything registered."""
        changes = self._changes
        if changes is None:
            changes = ContentChanges({content for content in self.content if not content >> GROUP_BITS})
        self._changes = ContentChanges()
        return changes

    def check(self) -> None:
        """Assert the invariant: every page is exactly one of free, used or cached."""
        used = sum(1 for users in self._num_users if users)
        assert len(self._free) + used + len(self._cached) == self.num_pages, (
            f"{len(self._free)} free + {used} used + {len(self._cached)} cached != {self.num_pages} pages"
        )
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        assert not any(self._num_users[page] for page in (*self._free, *self._cached)), "a page given back has a user"
        assert {page: content for content, page in self._page_of.items()} == self._content, "content index is torn"

    def _take_one(self) -> int:
        if self._free:
            page = self._free.popleft()
        else:
            page, _ = self._cached.popitem(last=False)
            self._remove(self._content.pop(page))
        self._num_users[page] = 1
        return page

    def _remove(self, content: int) -> None:
        """Remove content that no page holds any more from the index."""
        del self._page_of[content]
        if self._changes is not None:
            self._changes.remove(content)
        if self.on_removal is not None:
            self.on_removal(content)
