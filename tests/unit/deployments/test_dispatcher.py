"""When requests are sent on, to whom, and when they are refused."""

import asyncio

import pytest

from deployments.errors import NoReplicaError, OverloadedError
from deployments.fleet.fleet import Fleet, RoutingKey
from deployments.fleet.policy import CostPolicy
from deployments.fleet.work import Prospects
from deployments.model_config import AdmissionConfig
from deployments.router.dispatcher import Dispatcher
from deployments.router.waiting import Ticket
from llm.errors import EngineError
from llm.serving.schemas import EngineStats


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def idle(max_rows: int = 4) -> EngineStats:
    return EngineStats(
        num_running=0, num_waiting=0, num_waiting_tokens=0, num_free_pages=1000, num_used_pages=0, num_cached_pages=0,
        num_pages=1000, page_size=16, num_preemptions=0, num_generated_tokens=0, num_prompt_tokens=0,
        num_cached_prompt_tokens=0, max_rows=max_rows,
    )  # fmt: skip


class Setup:
    def __init__(self, **config: float) -> None:
        self.clock = Clock()
        self.fleet = Fleet(CostPolicy())
        self.dispatcher = Dispatcher(self.fleet, AdmissionConfig.model_validate(config), self.clock)
        self.dispatcher.learn_step_tokens(1000)

    def place(
        self, stream_id: int, tokens: int = 100, work: int = 200, session: bytes = b""
    ) -> "asyncio.Future[list[str]]":
        ticket = Ticket(stream_id, RoutingKey(tokens, session=session), work)
        self.dispatcher.enqueue(ticket)
        return ticket.ranking

    def start(self, replica_id: str, max_rows: int = 4) -> None:
        self.fleet.report(replica_id, idle(max_rows), [], [], True)
        self.dispatcher.pump()


async def test_what_waits_goes_to_a_replica_that_has_just_come_up():
    setup = Setup()
    placing = setup.place(1)
    assert setup.dispatcher.num_waiting == 1
    setup.start("a")
    assert await placing == ["a"]
    assert setup.dispatcher.num_waiting == 0


async def test_a_full_replica_gets_no_more_until_something_ends():
    setup = Setup()
    setup.start("a", max_rows=4)
    placing = [setup.place(i) for i in range(7)]
    assert [ranking.done() for ranking in placing] == [True] * 5 + [False] * 2, "a quarter more than it has rows"
    setup.fleet.ended(0)
    setup.dispatcher.pump()
    assert placing[5].done()
    assert not placing[6].done()
    setup.start("b")
    assert (await placing[6])[0] == "b"


async def test_prompts_wait_while_a_replica_has_some_steps_of_them_ahead():
    setup = Setup(max_backlog_steps=4)
    setup.start("a", max_rows=100)
    placing = [setup.place(i, tokens=1500) for i in range(6)]
    assert sum(ranking.done() for ranking in placing) == 3
    setup.fleet.prefilled(0)
    setup.dispatcher.pump()
    assert sum(ranking.done() for ranking in placing) == 4


async def test_one_who_gives_up_waiting_is_forgotten():
    setup = Setup()
    ticket = Ticket(1, RoutingKey(100), 200)
    setup.dispatcher.enqueue(ticket)
    setup.dispatcher.withdraw(ticket)
    setup.dispatcher.withdraw(ticket)
    assert setup.dispatcher.num_waiting == setup.dispatcher.num_waiting_tokens == 0


async def test_no_replica_for_too_long_is_an_error():
    setup = Setup(no_replica_timeout_s=60)
    early = setup.place(1)
    setup.clock.now += 50
    late = setup.place(2)
    setup.clock.now += 11
    setup.dispatcher.tick(Prospects(frozenset(), is_one_coming=True))
    with pytest.raises(NoReplicaError, match="60 s"):
        await early
    assert not late.done(), "it has waited for 11 seconds only"


async def test_a_router_that_an_update_has_left_behind_keeps_nobody_waiting():
    """The replica that is starting is of the next version: the client had better ask a new router."""
    setup = Setup(no_replica_timeout_s=60)
    waiting = setup.place(1)
    setup.clock.now += 2
    setup.dispatcher.tick(Prospects(frozenset(), is_one_coming=False, is_outdated=True))
    assert not waiting.done(), "the last of its version may just be coming back"
    setup.clock.now += 2
    setup.dispatcher.tick(Prospects(frozenset(), is_one_coming=False, is_outdated=True))
    with pytest.raises(NoReplicaError, match="updated"):
        await waiting


async def test_more_than_may_wait_is_refused():
    setup = Setup(max_queue_tokens=1000)
    setup.dispatcher.check(5000)
    [setup.place(i) for i in range(4)]
    setup.dispatcher.check(200)
    with pytest.raises(OverloadedError) as caught:
        setup.dispatcher.check(201)
    assert caught.value.retry_after_s >= 1
    assert setup.dispatcher.num_refused == 1


async def test_retry_after_comes_from_the_pace_measured():
    """Two requests of 200 tokens a second go out; what would wait longer than 5 s is refused, until when is said."""
    setup = Setup(max_queue_s=5)
    setup.start("a", max_rows=4)
    [setup.place(i) for i in range(5 + 6 + 8)]
    for i in range(6):
        setup.clock.now += 0.5
        setup.fleet.ended(i)
        setup.dispatcher.pump()
    assert setup.dispatcher.num_waiting == 8
    setup.dispatcher.check(400)
    with pytest.raises(OverloadedError) as caught:
        setup.dispatcher.check(2000)
    assert caught.value.retry_after_s == pytest.approx((8 * 200 + 2000) / 400 - 5, rel=0.05)
    with pytest.raises(OverloadedError):
        setup.dispatcher.check(200, timeout_s=2)


async def test_one_that_was_cancelled_is_given_up_without_a_word():
    """Its task has not got round to withdrawing it yet."""
    setup = Setup(no_replica_timeout_s=60)
    cancelled, other = setup.place(1), setup.place(2)
    cancelled.cancel()
    setup.clock.now += 61
    setup.dispatcher.tick(NOTHING)
    assert cancelled.cancelled()
    assert isinstance(other.exception(), NoReplicaError)
    assert setup.dispatcher.num_waiting == 0


NOTHING = Prospects(frozenset(), is_one_coming=False)


def resumed(stream_id: int, *, excluded: str = "", is_suspect: bool = False, num_output_tokens: int = 0) -> Ticket:
    return Ticket(
        stream_id, RoutingKey(100), 200, is_resumed=True, excluded=frozenset(excluded), is_suspect=is_suspect,
        num_output_tokens=num_output_tokens,
    )  # fmt: skip


async def test_a_request_never_goes_to_a_replica_that_failed_it():
    """And holds up nobody behind it that may go there."""
    setup = Setup()
    setup.start("a")
    ticket = resumed(1, excluded="a")
    setup.dispatcher.enqueue(ticket)
    assert await setup.place(2) == ["a"]
    assert not ticket.ranking.done()
    setup.start("b")
    assert await ticket.ranking == ["b"]


@pytest.mark.parametrize(("is_one_coming", "after_s"), [(False, 1), (True, 61)])
async def test_what_has_nowhere_to_go_is_told(is_one_coming: bool, after_s: float):
    """At once where no other replica is to come."""
    setup = Setup(no_replica_timeout_s=60)
    setup.start("a")
    ticket = resumed(1, excluded="a")
    setup.dispatcher.enqueue(ticket)
    prospects = Prospects(frozenset("a"), is_one_coming)
    setup.clock.now += after_s / 3
    setup.dispatcher.tick(prospects)
    assert not ticket.ranking.done()
    setup.clock.now += after_s
    setup.dispatcher.tick(Prospects(frozenset("ab"), is_one_coming))
    assert not ticket.ranking.done(), "another one may serve soon"
    setup.dispatcher.tick(prospects)
    with pytest.raises(EngineError, match="no other one"):
        await ticket.ranking


async def test_a_replica_is_sent_two_suspects_at_a_time():
    """One that it tries and one that follows. Those without tokens first; others are not held up."""
    setup = Setup()
    tickets = [resumed(i, is_suspect=True, num_output_tokens=10 - i) for i in range(6)]
    for ticket in tickets:
        setup.dispatcher.enqueue(ticket)
    setup.start("a", max_rows=8)
    assert [t.ranking.done() for t in tickets] == [False] * 4 + [True] * 2
    assert await setup.place(9) == ["a"]
    setup.dispatcher.clear(5)
    setup.dispatcher.pump()
    assert await tickets[3].ranking == ["a"], "and nowhere else: another replica may have enough"
    setup.start("b")
    assert tickets[2].ranking.result() == tickets[1].ranking.result() == ["b"]
    setup.dispatcher.withdraw(tickets[3])
    setup.dispatcher.pump()
    assert all(t.ranking.done() for t in tickets)
