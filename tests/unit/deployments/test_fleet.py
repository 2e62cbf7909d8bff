"""What a router knows of its replicas: every request counted once, wherever the reports stand."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from deployments.fleet.fleet import Fleet, RoutingKey
from deployments.fleet.policy import CostPolicy, ReplicaLoad, RoutedRequest
from llm.serving.schemas import EngineStats

PAGE = 16
IDLE = EngineStats(
    num_running=0, num_waiting=0, num_waiting_tokens=0, num_free_pages=1000, num_used_pages=0, num_cached_pages=0,
    num_pages=1000, page_size=PAGE, num_preemptions=0, num_generated_tokens=0, num_prompt_tokens=0,
    num_cached_prompt_tokens=0, max_rows=8,
)  # fmt: skip


class Recorder:
    """Notes what the fleet tells the policy of cached tokens."""

    def rank(self, loads: Sequence[ReplicaLoad], request: RoutedRequest) -> list[str]:
        self.cached = {load.replica_id: saved for load, saved in zip(loads, request.num_saved_tokens, strict=True)}
        return [load.replica_id for load in loads]


def state(rows: int = 0, waiting_tokens: int = 0) -> EngineStats:
    return replace(IDLE, num_running=rows, num_waiting_tokens=waiting_tokens)


def fleet_of(*replica_ids: str) -> Fleet:
    fleet = Fleet(Recorder())
    for replica_id in replica_ids:
        fleet.report(replica_id, IDLE, [], [], True)
    return fleet


def seen(fleet: Fleet, replica_id: str = "a") -> tuple[int, int]:
    """(rows, tokens to prefill)"""
    load = fleet.load(replica_id)
    return load.num_rows, load.num_prefill_tokens


def cached(fleet: Fleet, blocks: Sequence[int], num_tokens: int = 10_000) -> dict[str, int]:
    fleet.rank(RoutingKey(num_tokens, blocks))
    recorder = fleet._policy
    assert isinstance(recorder, Recorder)
    return recorder.cached


def test_what_is_sent_counts_at_once_until_it_ends():
    fleet = fleet_of("a", "b")
    fleet.sent("a", 1, RoutingKey(100, []))
    assert (seen(fleet), seen(fleet, "b")) == ((1, 100), (0, 0))
    fleet.prefilled(1)
    assert seen(fleet) == (1, 0)
    fleet.ended(1)
    assert seen(fleet) == (0, 0)


def test_a_report_that_does_not_know_a_request_yet_does_not_hide_it():
    fleet = fleet_of("a")
    fleet.sent("a", 1, RoutingKey(100, []))
    fleet.report("a", state(rows=3, waiting_tokens=50), [], [], False)
    assert seen(fleet) == (4, 150)


def test_a_report_that_counts_a_request_does_not_double_it():
    fleet = fleet_of("a")
    fleet.sent("a", 1, RoutingKey(100, []))
    fleet.sent("a", 2, RoutingKey(30, []))
    fleet.report("a", state(rows=1, waiting_tokens=80), [], [], False, [1])
    assert seen(fleet) == (2, 110)
    fleet.report("a", state(rows=2, waiting_tokens=30), [], [], False, [2])
    assert seen(fleet) == (2, 30)


def test_first_tokens_and_ends_after_a_report_are_taken_off():
    fleet = fleet_of("a")
    fleet.sent("a", 1, RoutingKey(100, []))
    fleet.report("a", state(rows=1, waiting_tokens=100), [], [], False, [1])
    fleet.sent("a", 2, RoutingKey(30, []))
    fleet.sent("a", 3, RoutingKey(40, []))
    fleet.prefilled(1)
    assert seen(fleet) == (3, 70)
    fleet.prefilled(1)
    fleet.ended(1)
    fleet.ended(1)
    assert seen(fleet) == (2, 70)


def test_an_aborted_request_leaves_nothing_behind():
    fleet = fleet_of("a")
    fleet.sent("a", 1, RoutingKey(160, list(range(10))))
    assert cached(fleet, list(range(10))) == {"a": 160}
    fleet.ended(1)
    fleet.report("a", IDLE, [], [], False)
    assert seen(fleet) == (0, 0)
    assert cached(fleet, list(range(10))) == {"a": 0}


def test_a_request_that_another_replica_took_counts_there():
    """Serve sends it on where the first of the ranking is gone; the other's report says so."""
    fleet = fleet_of("a", "b")
    fleet.sent("a", 1, RoutingKey(100, []))
    fleet.report("b", state(rows=1, waiting_tokens=100), [], [], False, [1])
    assert (seen(fleet), seen(fleet, "b")) == ((0, 0), (1, 100))
    fleet.ended(1)
    assert (seen(fleet), seen(fleet, "b")) == ((0, 0), (0, 0))
    assert fleet.load("a").num_own_rows == fleet.load("b").num_own_rows == 0


def test_own_rows_are_told_from_other_routers():
    fleet = fleet_of("a")
    fleet.sent("a", 1, RoutingKey(100, []))
    fleet.report("a", state(rows=5), [], [], False, [1])
    assert (fleet.load("a").num_rows, fleet.load("a").num_own_rows) == (5, 1)


def test_a_removed_replica_is_not_ranked_and_comes_back_with_a_snapshot():
    fleet = fleet_of("a", "b")
    fleet.report("a", IDLE, [7], [], False)
    fleet.sent("a", 1, RoutingKey(100, [7]))
    fleet.remove("a")
    assert fleet.rank(RoutingKey(10, [7])) == ["b"]
    fleet.prefilled(1)
    fleet.ended(1)
    fleet.sent("a", 2, RoutingKey(100, []))
    fleet.report("a", state(rows=2), [8], [], True)
    assert cached(fleet, [8]) == {"a": 16, "b": 0}
    assert cached(fleet, [7]) == {"a": 0, "b": 0}
    assert seen(fleet) == (2, 0)


def test_caches_follow_the_reports():
    fleet = fleet_of("a", "b")
    fleet.report("a", IDLE, [1, 2, 3], [], False)
    fleet.report("b", IDLE, [1], [], False)
    assert cached(fleet, [1, 2, 3, 4]) == {"a": 48, "b": 16}
    fleet.report("a", IDLE, [4], [3, 2], False)
    assert cached(fleet, [1, 2, 3])["a"] == 16
    fleet.report("a", IDLE, [5], [], True)
    assert cached(fleet, [1, 2, 3])["a"] == 0


def test_a_prompt_on_its_way_counts_as_cached_until_a_report_knows_better():
    fleet = fleet_of("a", "b")
    fleet.sent("a", 1, RoutingKey(40, [1, 2]))
    assert cached(fleet, [1, 2, 3]) == {"a": 32, "b": 0}
    fleet.report("a", state(rows=1, waiting_tokens=40), [], [], False, [1])
    assert cached(fleet, [1, 2, 3])["a"] == 32
    fleet.prefilled(1)
    assert cached(fleet, [1, 2, 3])["a"] == 32
    fleet.report("a", state(rows=1), [1], [], False)
    assert cached(fleet, [1, 2, 3])["a"] == 16


def test_the_last_token_is_never_cached():
    fleet = fleet_of("a")
    fleet.report("a", IDLE, [1, 2], [], False)
    assert cached(fleet, [1, 2], num_tokens=32) == {"a": 31}
    fleet.sent("a", 1, RoutingKey(32, [1, 2]))
    assert seen(fleet) == (1, 1)


@pytest.mark.parametrize("num_blocks", [0, 1, 7, 200])
@given(seed=st.integers(0, 2**32))
def test_the_search_finds_what_a_walk_finds(num_blocks, seed):
    """Every replica holds some beginning of the prompt; the search must find just how much."""
    draw = random.Random(seed)
    prompt = [draw.getrandbits(64) for _ in range(num_blocks)]
    favourites = [draw.randint(0, num_blocks) for _ in range(3)]
    expected = {}
    fleet = Fleet(Recorder())
    for i in range(20):
        depth = draw.choice([*favourites, draw.randint(0, num_blocks)])
        on_the_way = draw.randint(0, depth)  # of that, so much is in the reports and the rest is coming
        fleet.report(str(i), IDLE, [*prompt[: depth - on_the_way], draw.getrandbits(64)], [], True)
        fleet.sent(str(i), i, RoutingKey(10_000, prompt[:depth]))
        expected[str(i)] = depth * PAGE
    assert cached(fleet, prompt) == expected


@given(st.lists(st.tuples(st.sampled_from(["send", "arrive", "begin", "end", "report"]), st.integers(0, 9))))
def test_after_the_last_report_the_fleet_knows_what_the_replica_knows(events):
    """Whatever happens in whatever order: no request is lost or counted twice, and no count is below zero."""
    fleet, stage, unnamed = fleet_of("a"), dict.fromkeys(range(10), "new"), []
    for event, i in events:
        if event == "send" and stage[i] == "new":
            stage[i] = "sent"
            fleet.sent("a", i, RoutingKey(100, [i]))
        elif event == "arrive" and stage[i] == "sent":
            stage[i] = "waiting"
            unnamed.append(i)
        elif event == "begin" and stage[i] == "waiting":
            stage[i] = "running"
            fleet.prefilled(i)
        elif event == "end" and stage[i] != "new":
            stage[i] = "ended"
            fleet.ended(i)
        elif event == "report":
            num_waiting = sum(s == "waiting" for s in stage.values())
            num_running = sum(s == "running" for s in stage.values())
            fleet.report("a", state(num_waiting + num_running, 100 * num_waiting), [], [], False, unnamed)
            unnamed = []
        num_unfinished = sum(s in ("sent", "waiting") for s in stage.values())
        num_open = num_unfinished + sum(s == "running" for s in stage.values())
        assert seen(fleet) == (num_open, 100 * num_unfinished)
        assert fleet.load("a").num_own_rows == num_open


def test_with_the_cost_policy_a_conversation_stays_where_its_prefix_is():
    fleet = Fleet(CostPolicy())
    for replica_id in "abcd":
        fleet.report(replica_id, IDLE, [], [], True)
    blocks = list(range(200))
    first = fleet.rank(RoutingKey(1600, blocks[:100]))[0]
    fleet.sent(first, 1, RoutingKey(1600, blocks[:100]))
    fleet.prefilled(1)
    fleet.ended(1)
    fleet.report(first, IDLE, blocks[:100], [], False, [1])
    assert fleet.rank(RoutingKey(3200, blocks))[0] == first
