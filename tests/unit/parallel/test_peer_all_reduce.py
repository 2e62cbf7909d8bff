"""Sums over ranks: the kernel in Triton's interpreter, in processes that write to each other's memory."""

from pathlib import Path

import torch
import torch.multiprocessing as mp

from llm.core.partition import Partition
from llm.kernels.all_reduce import WORDS_PER_PROGRAM
from llm.parallel.collectives import Collectives, connect
from llm.parallel.peer_all_reduce import PeerAllReduce, PeerMemory

CAPACITY = 2 * WORDS_PER_PROGRAM
LARGEST = 2 * CAPACITY
"""16-bit numbers of the longest message."""
NUM_RANKS = 3


def map_inboxes(directory: Path) -> list[torch.Tensor]:
    """All ranks' inboxes: files that each rank maps."""
    size = 2 * NUM_RANKS * CAPACITY
    return [
        torch.from_file(str(directory / f"inbox{rank}"), shared=True, size=size, dtype=torch.int64)
        for rank in range(NUM_RANKS)
    ]


def parts_and_base(size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What each rank adds, and what it is added to."""
    generator = torch.Generator().manual_seed(size)
    numbers = torch.randn(NUM_RANKS + 1, size, generator=generator).to(dtype)
    return numbers[:-1], numbers[-1]


def check_sum(small: PeerAllReduce, group: Collectives, size: int, dtype: torch.dtype, rank: int) -> None:
    """Exact where the interpreter rounds as a GPU does, which it does not to bfloat16; the same bits everywhere."""
    parts, base = parts_and_base(size, dtype)
    expected = torch.zeros(size)
    for part in parts:
        expected += part.float()
    tolerance = {"rtol": 2**-6, "atol": 2**-4} if dtype == torch.bfloat16 else {"rtol": 0, "atol": 0}
    total = base.clone()
    small.add_all_reduce(parts[rank].clone(), total)
    output = group.all_reduce(parts[rank].clone())
    torch.testing.assert_close(output, expected.to(dtype), **tolerance)
    torch.testing.assert_close(total, base + expected.to(dtype), **tolerance)
    for tensor in (output, total):
        assert len(set(map(bytes, group.all_gather(tensor).view(torch.uint8).numpy()))) == 1, "ranks differ"


def sum_on(rank: int, directory: Path) -> None:
    """What each rank does."""
    torch.set_num_threads(1)
    partition = Partition(rank, NUM_RANKS)
    connection = connect(partition, directory / "store", torch.device("cpu"), timeout_s=60)
    inboxes = map_inboxes(directory)
    addresses = torch.tensor([inbox.data_ptr() for inbox in inboxes])
    memory = PeerMemory(addresses, inboxes[rank].view(2, NUM_RANKS, CAPACITY))
    small = PeerAllReduce(memory, partition)
    group = Collectives(connection, partition, small=small)
    # One size after another, so that programs have seen different numbers of calls.
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for size in (2, CAPACITY, LARGEST * 2 // dtype.itemsize, 30, CAPACITY // 2):
            check_sum(small, group, size, dtype, rank)
    large = parts_and_base(2 * LARGEST, torch.float32)[0]
    torch.testing.assert_close(group.all_reduce(large[rank].clone()), large.sum(0))

    inboxes[rank].zero_()  # another sum counts its calls from the beginning
    group.all_gather(torch.zeros(1))
    in_pieces = PeerAllReduce(memory, partition, deterministic=True)
    long = parts_and_base(2 * LARGEST + 6, torch.bfloat16)[0][rank]
    apart = torch.cat([in_pieces.all_reduce(piece.clone()) for piece in long.split(LARGEST // 4)])
    assert torch.equal(in_pieces.all_reduce(long.clone()), apart), "a sum depends on the size of its message"


def test_ranks_sum_the_same_bits_through_each_others_memory(tmp_path):
    """In the order of ranks, whatever the size; large messages by the group, or in pieces where sums must not vary."""
    for rank in range(NUM_RANKS):
        with (tmp_path / f"inbox{rank}").open("wb") as file:
            file.truncate(2 * NUM_RANKS * CAPACITY * 8)
    mp.spawn(sum_on, (tmp_path,), nprocs=NUM_RANKS)
