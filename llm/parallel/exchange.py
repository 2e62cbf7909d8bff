"""How a rank gets its `Exchange`."""

import logging
import os
from pathlib import Path

import torch

from llm.core.partition import Partition
from llm.parallel.collectives import Collectives, connect
from llm.parallel.ranks import CALL_TIMEOUT_S, STEP_TIMEOUT_S

_VARIABLE = "RAYLINE_PEER_ALL_REDUCE"

logger = logging.getLogger(__name__)


def join_ranks(partition: Partition, store_path: Path, device: torch.device, *, deterministic: bool) -> Collectives:
    """Connect this rank with the others, which do the same at the same time.

    Args:
        store_path, device: see `connect`.
        deterministic: see `Collectives`.
    """
    # On a GPU only the device waits in a collective: `RankGroup.wait_for`.
    timeout_s = STEP_TIMEOUT_S if device.type == "cpu" else CALL_TIMEOUT_S
    group = connect(partition, store_path, device, timeout_s)
    exchange = Collectives(group, partition, deterministic=deterministic)
    if device.type != "cuda" or os.environ.get(_VARIABLE) == "0":
        return exchange
    from llm.parallel.peer_all_reduce import PeerAllReduce  # triton is installed only on GPU machines

    try:
        peers = PeerAllReduce.on_gpus(exchange, partition, device)
    except RuntimeError as error:  # the same on all ranks: it depends on how the GPUs are linked
        logger.warning("all sums go through NCCL: %s", error)
        return exchange
    return Collectives(group, partition, peers=peers)
