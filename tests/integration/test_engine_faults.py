"""The short faults of the chaos suite that need no cluster: an engine's, and its channel's."""

import asyncio
from functools import partial

import pytest

from chaos import channel_faults, engine_faults

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize(
    "fault",
    [
        engine_faults.f4_forward_fails,
        partial(engine_faults.f9_small_pool, num_requests=16, num_tokens=60),
        partial(channel_faults.f17_frame_lost, num_streams=16, num_tokens=150),
        partial(channel_faults.f19_router_stuck, seconds=3, logprobs=(5,)),
        partial(channel_faults.f20_strangers, seconds=2),
    ],
    ids=["F4", "F9", "F17", "F19", "F20"],
)
def test_what_needs_no_cluster(fault):
    outcome = asyncio.run(fault(""))
    print(outcome.figure)
    assert outcome.is_ok, outcome.figure
