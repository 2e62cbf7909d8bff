"""F10: a cluster of several nodes on this machine, whose worker nodes join late and are taken away again and again.

The head has no GPU; each worker has one that is pretended, and so holds one replica.

Runs in a process of its own, for a process can be part of one Ray cluster only.
"""

import asyncio
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from chaos.faults import PROMPTS, summary, undisturbed
from chaos.fleet import Outcome, emulated, free_port, running

_NUM_WORKERS, _NUM_REPLICAS = 4, 3


async def f10_nodes_removed(_: str, num_removals: int = 8) -> Outcome:
    """Worker nodes are removed and others join, with 32 streams open."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "chaos.nodes", str(num_removals), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    output, _unused = await process.communicate()
    lines = [line for line in output.decode().splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"the cluster of nodes ended with code {process.returncode} and without a result")
    result = json.loads(lines[-1])
    return Outcome(result["figure"], result["is_ok"])


async def _remove_nodes(front_end: str, num_removals: int) -> Outcome:
    args = emulated(_NUM_REPLICAS)
    args["replicas"]["num_gpus"] = 1  # so that none fits on the head
    args["router"]["num_replicas"] = 2
    asyncio.get_running_loop().call_later(5, _join)
    async with running(front_end, "f10", args) as (fleet, clients):
        num_used = sum(_has_replica(node.node_id) for node in _workers)
        texts = await undisturbed(clients, 200)
        is_over = False
        asking = asyncio.create_task(clients.keep_asking(PROMPTS, 200, 32, lambda: is_over))
        for _ in range(num_removals):
            await asyncio.sleep(2)
            node = _workers.pop(0)
            is_used = _has_replica(node.node_id)
            before = await fleet.all_serving(clients)
            _cluster.remove_node(node, allow_graceful=False)
            _workers.append(_cluster.add_node(num_cpus=1, num_gpus=1))
            if is_used:
                await fleet.wait_until_replaced(clients, before)
            await fleet.wait_until_serving(clients, _NUM_REPLICAS)
        is_over = True
        text, is_whole = summary(await asking, texts)
        figure = f"replicas on {num_used} nodes that joined late; {num_removals} nodes removed and added: {text}"
        return Outcome(figure, is_whole, num_used == _NUM_REPLICAS)


def _join() -> None:
    """Let worker nodes join; by now the routers run, and the replicas wait for GPUs."""
    for _ in range(_NUM_WORKERS):
        _workers.append(_cluster.add_node(num_cpus=1, num_gpus=1))


def _has_replica(node_id: str) -> bool:
    """Whether an engine replica lives on a node."""
    from ray._private.state import actors

    return any(
        actor["State"] == "ALIVE" and "EngineReplica" in actor["Name"] and actor["Address"]["NodeID"] == node_id
        for actor in actors().values()
    )


if __name__ == "__main__":
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    logging.disable(logging.WARNING)
    os.environ["RAY_DEDUP_LOGS"] = "1"
    _cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
    _workers: list[Any] = []
    ray.init(address=_cluster.address, namespace="serve", log_to_driver=False)
    try:
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
        outcome = asyncio.run(_remove_nodes(f"http://127.0.0.1:{port}", int(sys.argv[1])))
        print(json.dumps({"figure": outcome.figure, "is_ok": outcome.is_ok}), flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()
        _cluster.shutdown()
