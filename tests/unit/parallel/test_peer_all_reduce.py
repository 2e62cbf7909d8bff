"""Sums over ranks: the kernels in Triton's interpreter, in processes that write to each other's memory."""

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from triton.runtime import interpreter
from triton_interpreter import quicken

from llm.core.partition import Partition
from llm.kernels.all_reduce import WORDS_PER_PROGRAM
from llm.kernels.chunked_all_reduce import Chunking
from llm.parallel.collectives import Collectives, connect
from llm.parallel.peer_all_reduce import PeerAllReduce, PeerMemory, small_inbox_bytes

MAX_SMALL_BYTES = 2 * WORDS_PER_PROGRAM * 4
CHUNKINGS = (
    Chunking(num_programs=2, chunk_words=512, owns_parts=False),
    Chunking(num_programs=4, chunk_words=512, lag=2, owns_parts=True),
)
NEARLY_WRAPPED = 2**31 - 3
"""Turns after which a count wraps around within the next messages."""


def map_memory(directory: Path, num_ranks: int, rank: int) -> PeerMemory:
    """All ranks' inboxes: files that each rank maps."""
    files = [directory / str(each) for each in range(num_ranks)]
    inboxes = [
        torch.from_file(str(file), shared=True, size=file.stat().st_size // 8, dtype=torch.int64) for file in files
    ]
    mapped.extend(inbox for each, inbox in enumerate(inboxes) if each != rank)
    return PeerMemory(torch.tensor([inbox.data_ptr() for inbox in inboxes]), inboxes[rank])


mapped: list[torch.Tensor] = []
"""The others' inboxes stay mapped: kernels have their addresses alone. A rank's own lives as long as what uses it."""


def parts_and_base(num_ranks: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What each rank adds, and what it is added to."""
    generator = torch.Generator().manual_seed(size)
    numbers = torch.randn(num_ranks + 1, size, generator=generator).to(dtype)
    return numbers[:-1], numbers[-1]


def check_sum(group: Collectives, partition: Partition, size: int, dtype: torch.dtype) -> None:
    """Exact where the interpreter rounds as a GPU does, which it does not to bfloat16; the same bits everywhere."""
    parts, base = parts_and_base(partition.size, size, dtype)
    expected = torch.zeros(size)
    for part in parts:
        expected += part.float()
    tolerance = {"rtol": 2**-6, "atol": 2**-4} if dtype == torch.bfloat16 else {"rtol": 0, "atol": 0}
    total = base.clone()
    group.add_all_reduce(parts[partition.rank].clone(), total)
    output = group.all_reduce(parts[partition.rank].clone())
    torch.testing.assert_close(output, expected.to(dtype), **tolerance)
    torch.testing.assert_close(total, base + expected.to(dtype), **tolerance)
    for tensor in (output, total):
        assert len(set(map(bytes, group.all_gather(tensor).view(torch.uint8).numpy()))) == 1, "ranks differ"


def give_way_when_waiting() -> None:
    """Let others have the processor before each look at a flag: ranks are often more than processors."""
    builder = interpreter.interpreter_builder
    look = builder.create_atomic_rmw

    def yield_and_look(*arguments: object) -> object:
        os.sched_yield()
        return look(*arguments)

    builder.create_atomic_rmw = yield_and_look


def sum_on(rank: int, num_ranks: int, directory: Path) -> None:
    """What each rank does."""
    torch.set_num_threads(1)
    quicken()
    give_way_when_waiting()
    partition = Partition(rank, num_ranks)
    connection = connect(partition, directory / "store", torch.device("cpu"), timeout_s=60)
    for number, chunking in enumerate(CHUNKINGS):
        memory = (map_memory(directory / f"{name}{number}", num_ranks, rank) for name in ("small", "large"))
        peers = PeerAllReduce(partition, *memory, chunking)
        check_sums(peers, Collectives(connection, partition, peers=peers), partition, chunking)


def check_sums(peers: PeerAllReduce, group: Collectives, partition: Partition, chunking: Chunking) -> None:
    """Sums of small and large messages, and columns, until counts wrap around."""
    rank, num_ranks = partition.rank, partition.size
    assert peers.max_small_bytes == MAX_SMALL_BYTES
    # One size after another, so that programs have seen different numbers of calls.
    for dtype, is_first in ((torch.bfloat16, True), (torch.float16, False), (torch.float32, False)):
        largest = MAX_SMALL_BYTES // dtype.itemsize
        for size in (2, largest, 30, largest + 2, 2 * largest - 6)[None if is_first else 3 :]:
            check_sum(group, partition, size, dtype)
    long = parts_and_base(num_ranks, 2 * largest + 6, torch.bfloat16)[0][rank]
    apart = torch.cat([group.all_reduce(piece.clone()) for piece in long.split(largest // 2)])
    assert torch.equal(group.all_reduce(long.clone()), apart), "a sum depends on the size of its message"

    for num_rows, size in ((1, 30), (3, 600)):
        parts = torch.randn(num_ranks, num_rows, size, generator=torch.Generator().manual_seed(size)).half()
        gathered = group.gather_columns(parts[rank])
        assert rank > 0 or torch.equal(gathered, torch.cat(list(parts), -1)), (num_rows, size)
        check_sum(group, partition, 2 * largest - 6, torch.float32)

    group.all_gather(torch.zeros(1))  # no rank raises a flag any more
    peers._turns.fill_(NEARLY_WRAPPED)
    flags = peers._large.inbox.view(torch.int32)[: chunking.num_flag_words(num_ranks)]
    flags.fill_(NEARLY_WRAPPED)
    group.all_gather(torch.zeros(1))  # all ranks begin from there
    for _ in range(2):
        check_sum(group, partition, 2 * largest, torch.float32)
    assert int(peers._turns.min()) < 0


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_sum_the_same_bits_through_each_others_memory(tmp_path, num_ranks):
    """In the order of ranks, whatever the size: with counts, and in chunks that all sum or that each sums a part of."""
    for number, chunking in enumerate(CHUNKINGS):
        sizes = small_inbox_bytes(MAX_SMALL_BYTES, num_ranks), 4 * chunking.inbox_words(num_ranks)
        for name, size in zip(("small", "large"), sizes, strict=True):
            directory = tmp_path / f"{name}{number}"
            directory.mkdir()
            for rank in range(num_ranks):
                with (directory / str(rank)).open("wb") as file:
                    file.truncate(size)
    mp.spawn(sum_on, (num_ranks, tmp_path), nprocs=num_ranks)
