"""When requests are sent on, to whom, and when they are refused."""

import asyncio

import pytest

from deployments.config import AdmissionConfig
from deployments.errors import NoReplicaError, OverloadedError
from deployments.fleet.fleet import Fleet
from deployments.fleet.policy import CostPolicy
from deployments.router.dispatcher import Dispatcher
from deployments.router.waiting import Ticket
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

    def place(self, stream_id: int, tokens: int = 100, work: int = 200) -> "asyncio.Future[list[str]]":
        ticket = Ticket(stream_id, tokens, work)
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
    ticket = Ticket(1, 100, 200)
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
    setup.dispatcher.tick()
    with pytest.raises(NoReplicaError, match="60 s"):
        await early
    assert not late.done(), "it has waited for 11 seconds only"


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
