"""How long calls take on the GPU by themselves."""

from collections.abc import Callable, Sequence

import torch

_NUM_REPLAYS = 3


def graph_microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Mean of the calls, one after the other in a CUDA graph, so that the host's launches are not in it.

    The first one is made by itself before, to compile what it needs.
    """
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(_NUM_REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / (_NUM_REPLAYS * len(calls))
