"""Policies as what they are: loads in, an order out."""

from collections import Counter

import pytest

from deployments.config import PolicyName
from deployments.fleet.policy import (
    ROW_TOKENS,
    CostPolicy,
    PowerOfTwoChoices,
    ReplicaLoad,
    RoundRobin,
    RoutedRequest,
    make_policy,
)


def loads(**prefill_tokens: int) -> list[ReplicaLoad]:
    """Replicas by name with so many tokens to prefill, and no rows."""
    return [ReplicaLoad(name, max_rows=256, num_prefill_tokens=tokens) for name, tokens in prefill_tokens.items()]


def rows(*num_rows: int, own: bool = True) -> list[ReplicaLoad]:
    """Replicas "0", "1", … with so many rows, all of this router or none."""
    return [ReplicaLoad(str(i), n, n if own else 0, 256) for i, n in enumerate(num_rows)]


def test_fewest_tokens_until_the_first_token_win():
    """900 to wait for and 100 to compute cost as much as 0 and 1000; the cached prefix decides beyond that."""
    policy = CostPolicy(row_tokens=0)
    assert policy.rank(loads(busy=901, idle=0), RoutedRequest(1000, [900, 0]))[0] == "idle"
    assert policy.rank(loads(busy=899, idle=0), RoutedRequest(1000, [900, 0]))[0] == "busy"


def test_a_row_counts_for_its_tokens():
    policy = CostPolicy()
    assert policy.rank(rows(1, 0), RoutedRequest(2000, [ROW_TOKENS - 1, 0]))[0] == "1"
    assert policy.rank(rows(1, 0), RoutedRequest(2000, [ROW_TOKENS + 1, 0]))[0] == "0"


def test_equal_costs_go_to_fewest_rows():
    fleet = [ReplicaLoad("a", 2, 2, 256, 0), ReplicaLoad("b", 1, 1, 256, ROW_TOKENS)]
    assert {CostPolicy(seed=seed).rank(fleet, RoutedRequest(100, [0, 0]))[0] for seed in range(10)} == {"b"}


def test_an_idle_fleet_is_used_evenly():
    policy = CostPolicy()
    chosen = Counter(policy.rank(rows(*[0] * 8), RoutedRequest(100, [0] * 8))[0] for _ in range(80))
    assert set(chosen.values()) == {10}


def test_a_hot_prefix_spreads_once_its_holder_is_busy():
    """Of requests that all share 4,000 tokens, the holder gets as many as make waiting dearer than computing."""
    fleet = loads(holder=0, cold=0)
    policy, cached, num_tokens = CostPolicy(), {"holder": 4000, "cold": 0}, 4100
    chosen = []
    for _ in range(40):
        best = policy.rank(fleet, RoutedRequest(num_tokens, [cached[load.replica_id] for load in fleet]))[0]
        load = next(load for load in fleet if load.replica_id == best)
        load.num_rows += 1
        load.num_own_rows += 1
        load.num_prefill_tokens += num_tokens - cached[best]
        cached[best] = 4000
        chosen.append(best)
    assert chosen[:6] == ["holder"] * 6
    assert chosen.count("cold") >= 15


def test_routers_that_know_the_same_do_not_all_choose_the_same():
    """Eight routers see rows of others and one replica that is a little better: alone, each would choose it."""
    fleet = rows(4, *[5] * 7, own=False)
    policies = [CostPolicy(seed=seed) for seed in range(8)]
    chosen = [policy.rank(fleet, RoutedRequest(1000, [0] * 8))[0] for _ in range(400) for policy in policies]
    share = Counter(chosen)["0"] / len(chosen)
    assert 1 / 8 < share < 0.4

    own = rows(4, *[5] * 7)
    assert {
        policy.rank(own, RoutedRequest(1000, [0] * 8))[0] for policy in [CostPolicy(seed=1)] for _ in range(100)
    } == {"0"}


def test_a_long_cached_prefix_outweighs_what_other_routers_may_have_sent():
    fleet, policy = rows(4, *[4] * 7, own=False), CostPolicy(seed=0)
    assert {policy.rank(fleet, RoutedRequest(60_000, [59_000, *[0] * 7]))[0] for _ in range(200)} == {"0"}


def test_round_robin_takes_turns():
    policy, fleet = RoundRobin(), rows(9, 0, 0)
    chosen = [policy.rank(fleet, RoutedRequest(100, [0, 0, 0]))[0] for _ in range(6)]
    assert chosen[:3] == chosen[3:]
    assert set(chosen) == {"0", "1", "2"}


def test_power_of_two_takes_the_less_busy_of_two():
    """The busiest of n is chosen never, the least busy whenever it is drawn: in 2 of n draws."""
    policy, fleet = PowerOfTwoChoices(seed=0), rows(0, 1, 2, 3)
    chosen = Counter(policy.rank(fleet, RoutedRequest(100, [0] * 4))[0] for _ in range(2000))
    assert chosen["3"] == 0
    assert chosen["0"] == pytest.approx(1000, abs=100)


@pytest.mark.parametrize("name", PolicyName)
def test_every_policy_ranks_everybody_once(name):
    policy = make_policy(name)
    assert policy.rank([], RoutedRequest(10, [])) == []
    assert policy.rank(rows(0), RoutedRequest(10, [0])) == ["0"]
    for _ in range(10):
        assert sorted(policy.rank(rows(3, 1, 2), RoutedRequest(10, [0, 5, 0]))) == ["0", "1", "2"]
