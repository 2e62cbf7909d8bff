"""The short faults of the chaos suite, on the session's cluster."""

import asyncio
from functools import partial

import pytest
from live_server import Server

from chaos import embedding_faults, faults, rank_faults, scaling_faults, verdict_faults
from chaos.fleet import Fleet, Outcome

pytestmark = pytest.mark.timeout(120)


def check(outcome: Outcome) -> None:
    print(outcome.figure)
    assert outcome.is_ok, outcome.figure


@pytest.mark.parametrize(
    "fault",
    [
        partial(faults.f1_kill_replicas, num_kills=1, num_clients=32),
        faults.f3_before_the_first_byte,
        partial(faults.f7_disconnects, num_streams=100),
        partial(verdict_faults.f13_steps_fail, num_clients=32),
        partial(verdict_faults.f14_engine_breaks, num_clients=32),
        partial(embedding_faults.f22_embedding_hangs, num_streams=12, num_tokens=200),
    ],
    ids=["F1", "F3", "F7", "F13", "F14", "F22"],
)
def test_a_fleet_outlives(fleet: Fleet, fault):
    """One after the other on the same fleet, which is whole again after each."""
    check(asyncio.run(fault(fleet)))


@pytest.mark.timeout(240)  # four processes load a model
def test_a_replica_outlives_no_process_of_its_model(server: Server):
    """Each of two replicas runs half of the demo model in a process of its own; texts are those of one process."""
    texts = {prompt: server.ask(prompt, max_tokens=400) for prompt in rank_faults.PROMPTS}
    check(asyncio.run(rank_faults.f25_rank_killed(server.url, texts=texts, waits_for_another=False)))


@pytest.mark.parametrize(
    "fault",
    [
        faults.f2_nobody_left,
        partial(verdict_faults.f18_update_of_the_model, rate=4),
        partial(scaling_faults.f24_scaled_to_zero, start_s=9, no_replica_timeout_s=6),
    ],
    ids=["F2", "F18", "F24"],
)
def test_a_fleet_of_its_own(server: Server, fault):
    check(asyncio.run(fault(server.url)))
