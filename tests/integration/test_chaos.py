"""The short faults of the chaos suite, on the session's cluster."""

import asyncio
from functools import partial

import pytest
from live_server import Server

from chaos import channel_faults, embedding_faults, engine_faults, faults, scaling_faults, verdict_faults

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize(
    "fault",
    [
        partial(faults.f1_kill_replicas, num_kills=1),
        faults.f1_kill_demo,
        faults.f2_nobody_left,
        faults.f3_before_the_first_byte,
        engine_faults.f4_forward_fails,
        partial(faults.f7_disconnects, num_streams=100),
        engine_faults.f9_small_pool,
        partial(verdict_faults.f13_steps_fail, num_clients=32),
        partial(verdict_faults.f14_engine_breaks, num_clients=32),
        partial(verdict_faults.f15_poison_kills, num_streams=16),
        partial(channel_faults.f17_frame_lost, num_streams=16),
        verdict_faults.f18_update_of_the_model,
        partial(channel_faults.f19_router_stuck, seconds=3),
        partial(channel_faults.f20_strangers, seconds=2),
        partial(embedding_faults.f22_embedding_hangs, num_streams=12),
        partial(scaling_faults.f24_scaled_to_zero, start_s=6, no_replica_timeout_s=2),
    ],
    ids=["F1", "F1 demo", "F2", "F3", "F4", "F7", "F9", "F13", "F14", "F15", "F17", "F18", "F19", "F20", "F22", "F24"],
)
def test_what_must_hold_holds(server: Server, fault):
    outcome = asyncio.run(fault(server.url))
    print(outcome.figure)
    assert outcome.is_ok, outcome.figure
