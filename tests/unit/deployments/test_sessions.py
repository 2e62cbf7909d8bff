"""Sessions break ties between replicas, and nothing more."""

import random
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from in_process import ServiceFactory, emulated_config
from test_fleet import IDLE
from test_policy import loads, rows

from benchmarks.routing_events import Simulation
from benchmarks.routing_replica import ReplicaSpeed
from benchmarks.routing_trace import TraceRequest
from deployments.config import PolicyName
from deployments.fleet import sessions
from deployments.fleet.fleet import Fleet, RoutingKey
from deployments.fleet.policy import ROW_TOKENS, CostPolicy, PowerOfTwoChoices, RoutedRequest
from deployments.fleet.sessions import SessionHomes, session_key

SHORT = 10
"""Tokens of a prompt too short for a page, so no cache says where its session was."""


def idle_fleet(*replica_ids: str, seed: int = 0) -> Fleet:
    fleet = Fleet(CostPolicy(seed=seed))
    for replica_id in replica_ids:
        fleet.report(replica_id, IDLE, [], [], True)
    return fleet


def serve(fleet: Fleet, stream_id: int, session: bytes, num_tokens: int = SHORT) -> str:
    """Send a request where the fleet says, and end it."""
    chosen = fleet.rank(RoutingKey(num_tokens, [], session))[0]
    fleet.sent(chosen, stream_id, RoutingKey(num_tokens, [], session))
    fleet.ended(stream_id)
    return chosen


def test_requests_of_a_session_stay_on_one_replica_of_an_idle_fleet():
    """Without a session they go round; with one, each of 40 sessions sees one replica, and all replicas get some."""
    fleet = idle_fleet(*"abcd")
    assert {serve(fleet, i, b"") for i in range(4)} == set("abcd")
    seen: defaultdict[bytes, set[str]] = defaultdict(set)
    order = [session_key("", str(i)) for i in range(40)] * 5
    random.Random(0).shuffle(order)
    for i, session in enumerate(order):
        seen[session].add(serve(fleet, 10 + i, session))
    assert all(len(homes) == 1 for homes in seen.values())
    assert set.union(*seen.values()) == set("abcd")


def test_a_session_follows_what_served_it_last():
    fleet = idle_fleet("a", "b")
    session = session_key("", "s")
    for last in ("a", "b", "a"):
        fleet.sent(last, 1, RoutingKey(SHORT, [], session))
        fleet.ended(1)
        assert {fleet.rank(RoutingKey(SHORT, [], session))[0] for _ in range(4)} == {last}


def test_a_session_follows_its_request_to_the_replica_that_took_it():
    fleet = idle_fleet("a", "b")
    session = session_key("", "s")
    fleet.sent("a", 1, RoutingKey(SHORT, [], session))
    fleet.report("b", IDLE, [], [], False, received=[1])
    fleet.ended(1)
    assert {fleet.rank(RoutingKey(SHORT, [], session))[0] for _ in range(4)} == {"b"}


@pytest.mark.parametrize("tokens", [0, 1, ROW_TOKENS // 2])
def test_a_home_that_costs_about_the_same_wins(tokens: int):
    fleet = loads(home=tokens, cheaper=0)
    request = RoutedRequest(100, [0, 0], "home")
    assert {CostPolicy(seed=seed).rank(fleet, request)[0] for seed in range(10)} == {"home"}


@pytest.mark.parametrize("tokens", [ROW_TOKENS // 2 + 1, ROW_TOKENS, 10_000])
def test_a_replica_that_is_clearly_cheaper_wins(tokens: int):
    fleet = loads(home=tokens, cheaper=0)
    assert {CostPolicy(seed=seed).rank(fleet, RoutedRequest(100, [0, 0], "home"))[0] for seed in range(10)} == {
        "cheaper"
    }


def test_one_row_more_or_a_cached_prefix_elsewhere_is_clearly_cheaper():
    assert CostPolicy().rank(rows(1, 0), RoutedRequest(100, [0, 0], "0"))[0] == "1"
    assert CostPolicy().rank(rows(0, 0), RoutedRequest(2000, [0, 1024], "0"))[0] == "1"


def test_other_routers_requests_do_not_send_a_session_elsewhere():
    """With several routers costs are blurred, but a home's cost is compared as it is."""
    policy, fleet = CostPolicy(seed=0), rows(*[4] * 8, own=False)
    for _ in range(200):
        policy.rank(fleet, RoutedRequest(1000, [0] * 8))
    assert {policy.rank(fleet, RoutedRequest(1000, [0] * 8, "3"))[0] for _ in range(100)} == {"3"}
    busier = rows(*[4] * 3, 5, *[4] * 4, own=False)
    assert Counter(policy.rank(busier, RoutedRequest(1000, [0] * 8, "3"))[0] for _ in range(400))["3"] < 100


def test_routers_that_do_not_know_a_session_agree_on_its_replica():
    """And when another replica goes, only its sessions move."""
    routers = [idle_fleet(*"abcd", seed=seed) for seed in range(3)]
    names = [session_key("team", str(i)) for i in range(50)]
    chosen = [[fleet.rank(RoutingKey(SHORT, [], name))[0] for fleet in routers] for name in names]
    assert all(len(set(each)) == 1 for each in chosen)
    routers[0].remove("b")
    for name, (before, *_) in zip(names, chosen, strict=True):
        after = routers[0].rank(RoutingKey(SHORT, [], name))[0]
        assert after == before if before != "b" else after != "b"


def test_power_of_two_prefers_the_home_of_the_two_it_drew():
    policy = PowerOfTwoChoices(seed=0)
    chosen = Counter(policy.rank(rows(0, 0, 0, 0), RoutedRequest(100, [0] * 4, "2"))[0] for _ in range(2000))
    assert chosen["2"] == pytest.approx(1000, abs=100), "whenever it is drawn: in 2 of 4 draws"
    assert policy.rank(rows(1, 0), RoutedRequest(100, [0, 0], "0"))[0] == "1"


def test_a_replica_that_goes_is_forgotten_and_its_sessions_find_another():
    fleet = idle_fleet("a", "b", "c")
    names = [session_key("", str(i)) for i in range(30)]
    homes = {name: serve(fleet, i, name) for i, name in enumerate(names)}
    fleet.remove("a")
    assert len(fleet._sessions) == sum(home != "a" for home in homes.values())
    for i, name in enumerate(names):
        chosen = serve(fleet, 100 + i, name)
        assert chosen == homes[name] if homes[name] != "a" else chosen in ("b", "c")
    fleet.report("a", IDLE, [], [], True)
    for i, name in enumerate(names):
        assert serve(fleet, 200 + i, name) != "a", "the replica is new, so nothing of the session is there"


def test_memory_is_bounded_and_the_longest_unused_go_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sessions, "MAX_SESSIONS", 3)
    homes = SessionHomes()
    for name in (b"1", b"2", b"3", b"1", b"4"):
        homes.note(name, "home")
    homes.note(b"", "home")
    assert len(homes) == 3
    assert [homes.home(name, ["other"]) for name in (b"1", b"2", b"3", b"4")] == ["home", "other", "home", "home"]


def test_keys_do_not_share_sessions():
    names = [session_key(*pair) for pair in (("", "ab"), ("a", "b"), ("ab", ""), ("b", "a"), ("é", "b"))]
    assert names[2] == b"", "no session"
    assert len(set(names)) == len(names)


def test_sessions_do_not_make_a_fleet_uneven():
    """A few long sessions and many requests at once: nobody waits because of where a session was."""

    def run(sessions_of: dict[int, bytes]) -> tuple[float, float]:
        draw = random.Random(1)
        trace = [TraceRequest(i * 0.02, draw.randint(200, 2000), draw.randint(20, 200), ()) for i in range(600)]
        simulation = Simulation(
            trace, policy=PolicyName.COST, num_replicas=4, num_routers=1, speed=ReplicaSpeed(), time_scale=1.0, seed=0
        )
        (fleet,) = simulation._fleets
        rank, sent = fleet.rank, fleet.sent
        waiting = iter(range(len(trace)))

        def ranked(key: RoutingKey) -> list[str]:
            fleet.now_serving = sessions_of.get(next(waiting), b"")
            return rank(replace(key, session=fleet.now_serving))

        fleet.rank = ranked
        fleet.sent = lambda to, stream_id, key: sent(to, stream_id, replace(key, session=fleet.now_serving))
        simulation.run()
        served = [replica.num_served for replica in simulation.replicas]
        waited = sum(r.first_token_s - r.request.arrival_s for r in simulation.requests)
        return max(served) / min(served), waited / len(trace)

    draw = random.Random(2)
    _, without = run({})
    imbalance, with_sessions = run({i: session_key("", str(draw.randrange(3))) for i in range(600)})
    assert imbalance < 1.6
    assert with_sessions < 1.15 * without


async def test_a_session_stays_on_its_replica_through_the_api(make_service: ServiceFactory):
    service = await make_service(emulated_config(replicas={"num_replicas": 3}), num_replicas=3)

    async def num_that_served(**headers: str) -> int:
        before = [replica._loop._engine.stats().num_prompt_tokens for replica in service.client.replicas]
        for _ in range(6):
            body = {"model": "demo", "prompt": "a", "max_tokens": 1}
            assert (await service.http.post("/v1/completions", json=body, headers=headers)).status_code == 200
        after = [replica._loop._engine.stats().num_prompt_tokens for replica in service.client.replicas]
        return sum(later > earlier for earlier, later in zip(before, after, strict=True))

    assert await num_that_served() == 3
    assert await num_that_served(**{"X-Session-Id": "mine"}) == 1
