"""Several nodes: replicas where the GPUs are, nodes that join late and leave, two routers on a head without a GPU."""

import asyncio

import pytest

from chaos.nodes import f10_nodes_removed


@pytest.mark.timeout(240)
def test_nodes_join_and_leave():
    outcome = asyncio.run(asyncio.wait_for(f10_nodes_removed("", num_removals=1), 200))
    assert outcome.is_ok, outcome.figure
