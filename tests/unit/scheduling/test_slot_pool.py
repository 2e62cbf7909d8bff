"""The slot pool: free + used + cached = total, whatever happens."""

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llm.errors import CapacityError
from llm.scheduling.prefix_cache import PageHashes
from llm.scheduling.slot_pool import SlotPool


def test_allocate_takes_all_or_nothing():
    """Asking for more than there is raises and takes nothing."""
    pool = SlotPool(num_pages=4, page_size=16)
    pool.allocate(3)
    with pytest.raises(CapacityError, match="2 pages asked for, 1 of 4 available"):
        pool.allocate(2)
    assert pool.num_free == 1


def test_forgotten_content_is_found_by_nobody():
    """Its pages are free as soon as their users give them back."""
    pool = SlotPool(4, 16)
    first, second = pool.allocate(2)
    pool.register(first, content=1)
    pool.take_changes()
    pool.forget([first, second])
    assert pool.find(1) is None
    assert pool.take_changes().removed == {1}
    pool.release([first, second])
    assert (pool.num_free, pool.num_cached) == (4, 0)
    pool.check()


def test_released_content_is_found_until_its_page_is_needed():
    """A released page with content becomes cached; the one released first is given up first."""
    pool = SlotPool(num_pages=2, page_size=16)
    first, second = pool.allocate(2)
    pool.register(first, content=1)
    pool.register(second, content=2)
    pool.release([second])
    pool.release([first])
    assert (pool.num_cached, pool.num_used, pool.num_free) == (2, 0, 0)
    assert pool.allocate(1) == [second]
    assert pool.find(2) is None
    assert pool.find(1) == first


def test_head_of_a_sequence_outlives_its_tail():
    """Pages of one sequence are given up from the end, so that the shared beginning stays useful."""
    pool = SlotPool(num_pages=3, page_size=16)
    pages = pool.allocate(3)
    for content, page in enumerate(pages):
        pool.register(page, content)
    pool.release(pages)
    pool.allocate(1)
    assert [pool.find(content) for content in range(3)] == [pages[0], pages[1], None]


def test_shared_page_stays_used_until_its_last_user_leaves():
    pool = SlotPool(num_pages=1, page_size=16)
    (page,) = pool.allocate(1)
    pool.register(page, content=7)
    pool.share([page])
    pool.release([page])
    assert pool.num_used == 1
    pool.release([page])
    assert pool.num_cached == 1


def test_equal_prefixes_and_only_those_hash_alike():
    """A page's hash covers everything before it, and the salt."""
    tokens = list(range(40))
    hashes = PageHashes(16).extend(tokens, 40)
    assert len(hashes) == 2
    assert PageHashes(16).extend([*tokens[:16], *[0] * 16], 32)[0] == hashes[0]
    assert PageHashes(16).extend([99, *tokens[1:]], 32)[1] != hashes[1]
    assert PageHashes(16, salt=b"tenant").extend(tokens, 40)[0] != hashes[0]
    grown = PageHashes(16)
    grown.extend(tokens, 20)
    assert grown.extend(tokens, 40) == hashes


class PoolMachine(RuleBasedStateMachine):
    """Random users allocate, register, share and release; the invariant holds after every move."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = SlotPool(num_pages=8, page_size=4)
        self.held: list[int] = []
        self.told: set[int] = set()

    @rule(num_pages=st.integers(0, 4))
    def allocate(self, num_pages: int) -> None:
        if num_pages <= self.pool.num_available:
            self.held += self.pool.allocate(num_pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), content=st.integers(0, 5))
    def register(self, data: st.DataObject, content: int) -> None:
        page = data.draw(st.sampled_from(self.held))
        if page not in self.pool._content:
            self.pool.register(page, content)

    @rule(content=st.integers(0, 5))
    def share(self, content: int) -> None:
        page = self.pool.find(content)
        if page is not None:
            self.pool.share([page])
            self.held.append(page)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.held))
        self.held.remove(page)
        self.pool.release([page])

    @rule()
    def tell_changes(self) -> None:
        changes = self.pool.take_changes()
        assert not changes.added & self.told
        assert changes.removed <= self.told
        self.told = (self.told | changes.added) - changes.removed
        assert self.told == set(self.pool.content)

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        self.pool.check()
        assert self.pool.num_used == len(set(self.held))


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
