"""Sums over two GPUs through each other's memory, against NCCL's and against sums on one GPU."""

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from llm.core.partition import Partition
from llm.kernels.chunked_all_reduce import Chunking
from llm.parallel.collectives import Collectives, connect
from llm.parallel.environment import ENVIRONMENT
from llm.parallel.peer_all_reduce import PeerAllReduce

NUM_RANKS = 2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < NUM_RANKS, reason="needs two CUDA devices"),
]


def parts_on(device: torch.device, size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """What each rank adds, and a row more, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(NUM_RANKS + 1, size, generator=generator).to(device, dtype)


def check(peers: PeerAllReduce, group: Collectives, rank: int, device: torch.device) -> None:
    """One size and format after another: the exact sum, alone and added, as NCCL has it."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        largest = peers.max_small_bytes // dtype.itemsize
        for size in (2, 1024, 4096, 4098, 100_000, 262_144, largest, largest + 2, 2 * largest + 98, 10_000_000):
            *parts, base = parts_on(device, size, dtype, size)
            expected = sum(part.float() for part in parts).to(dtype)
            assert torch.equal(peers.all_reduce(parts[rank].clone()), expected), (dtype, size)
            total = base.clone()
            peers.add_all_reduce(parts[rank], total)
            assert torch.equal(total, base + expected), (dtype, size)
            columns = peers.gather_columns(parts[rank])
            assert rank > 0 or torch.equal(columns, torch.cat(parts)), (dtype, size)
            assert torch.equal(group.all_reduce(parts[rank].clone()), expected), (dtype, size)


def replay(peers: PeerAllReduce, rank: int, device: torch.device, num_replays: int) -> None:
    """A graph of sums that go round, replayed as fast as the GPUs go: whoever reads too late or too early is wrong."""
    sizes = (4096, 262_144, 4_194_304, 64, 12_000_000, 3_000_064, 8192)
    inputs = [torch.empty(size, dtype=torch.bfloat16, device=device) for size in sizes]
    wrong = torch.zeros(1, dtype=torch.int32, device=device)
    turn = torch.zeros(1, device=device)
    for x in inputs[:3]:
        peers.all_reduce(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        turn += 1
        for i, x in enumerate(inputs):
            x.copy_(((turn * (i + 1) + rank) % 64).expand_as(x))
            expected = (turn * (i + 1)) % 64 + (turn * (i + 1) + 1) % 64
            wrong += (peers.all_reduce(x).float() != expected).any()
    for _ in range(num_replays):
        graph.replay()
    torch.cuda.synchronize()
    assert wrong.item() == 0, f"{wrong.item()} wrong sums"


def sum_on(rank: int, directory: Path) -> None:
    """What each rank does."""
    device, partition = torch.device("cuda", rank), Partition(rank, NUM_RANKS)
    torch.cuda.set_device(device)
    group = Collectives(connect(partition, directory / "store", device, timeout_s=60), partition)
    for chunking in (None, Chunking(num_programs=300, chunk_words=2048, lag=2), Chunking(num_programs=7)):
        peers = PeerAllReduce.on_gpus(group, partition, device, chunking=chunking)
        check(peers, group, rank, device)
        replay(peers, rank, device, num_replays=2000)
    torch.cuda.synchronize()


def test_sums_through_peer_memory(tmp_path, monkeypatch):
    """The exact sums, on both ranks, by themselves and in graphs that are replayed thousands of times."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
        assert os.environ[name] == value
    mp.spawn(sum_on, (tmp_path,), nprocs=NUM_RANKS)
