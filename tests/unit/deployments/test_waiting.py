"""The order in which waiting requests go: resumed, by priority, fair among tenants, by arrival."""

from hypothesis import given, strategies as st

from deployments.fleet.fleet import RoutingKey
from deployments.router.waiting import Ticket, WaitingQueue


def ticket(stream_id: int, tenant: str = "", priority: int = 0, work: int = 100, is_resumed: bool = False) -> Ticket:
    return Ticket(
        stream_id, RoutingKey(work), work, tenant=tenant, priority=priority, is_resumed=is_resumed, ranking=None
    )


def drain(queue: WaitingQueue) -> list[int]:
    return [queue.pop().stream_id for _ in range(len(queue))]


def test_resumed_then_priority_then_arrival():
    queue = WaitingQueue()
    for t in (ticket(1, priority=5), ticket(2), ticket(3, priority=-1), ticket(4), ticket(5, is_resumed=True)):
        queue.push(t)
    assert drain(queue) == [5, 3, 2, 4, 1]
    assert queue.pop() is None


def test_a_tenant_with_many_requests_does_not_hold_up_another():
    queue = WaitingQueue()
    for i in range(6):
        queue.push(ticket(i, "greedy"))
    queue.push(ticket(10, "modest"))
    queue.push(ticket(11, "modest"))
    assert drain(queue) == [0, 10, 1, 11, 2, 3, 4, 5]


def test_shares_are_of_work_not_of_requests():
    queue = WaitingQueue()
    for i in range(3):
        queue.push(ticket(i, "long", work=1000))
    for i in range(10, 25):
        queue.push(ticket(i, "short", work=100))
    order = drain(queue)
    assert order.index(1) == 11, "ten short requests go between two long ones"


def test_a_pause_earns_no_credit():
    queue = WaitingQueue()
    queue.push(ticket(0, "late"))
    for i in range(1, 9):
        queue.push(ticket(i, "busy"))
    assert [queue.pop().stream_id for _ in range(6)] == [0, 1, 2, 3, 4, 5]
    for i in range(20, 24):
        queue.push(ticket(i, "late"))
    assert drain(queue)[:4] in ([20, 6, 21, 7], [6, 20, 7, 21]), "not all of the late one's first"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-2, 2), st.booleans(), st.booleans()), max_size=40))
def test_nothing_is_lost_and_the_sums_are_right(moves):
    """Whatever is pushed, popped and removed in between."""
    queue, waiting = WaitingQueue(), {}
    for i, (tenant, priority, is_resumed, pops) in enumerate(moves):
        waiting[i] = ticket(i, tenant, priority, work=i + 1, is_resumed=is_resumed)
        queue.push(waiting[i])
        if pops:
            del waiting[queue.pop().stream_id]
        elif i % 3 == 2 and waiting:
            queue.remove(waiting.pop(min(waiting)))
        assert len(queue) == len(waiting)
        assert {t.stream_id for t in queue} == set(waiting)
        assert queue.num_tokens == queue.num_work_tokens == sum(t.key.num_tokens for t in waiting.values())
    assert sorted(drain(queue)) == sorted(waiting)
    assert not queue
