"""Sum over the GPUs of a node through each other's memory, for messages that fill the link between them.

Numbers travel as they are. All that they need beside them is a flag for many: a program sends a chunk of its message,
and then raises a flag that says so at every other rank. Meanwhile it adds up an earlier chunk.

Between two ranks each sends all that it has, and both add up everything. Among more, each rank owns one part of every
chunk: the others send it theirs, and it sends the sum to all ("two-shot"). Either way 2 (ranks - 1) / ranks times the
message cross a rank's link in each direction, the least that is possible (Patarasuk & Yuan 2009, "Bandwidth optimal
all-reduce algorithms for clusters of workstations").
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from llm.kernels.all_reduce import added, half_of, word_of
from llm.kernels.launch import launch_options, triton_type, wait_for_inputs

_FLAG_WORDS: tl.constexpr = tl.constexpr(32)
"""Words from one flag to the next: each has a line of memory to itself."""


class Chunking(NamedTuple):
    """How a message is cut into chunks, and who sums them.

    Attributes:
        num_programs: most programs of a launch; the more there are, the more bytes are on their way at once.
        chunk_words: words of 4 bytes that a program sends in a turn, a power of two.
        lag: turns between sending a chunk and using what the others have sent of it, a power of two.
        num_warps: of a program.
        owns_parts: each rank adds up a part of each chunk, and sends the sum to all. With two ranks that saves nothing.
    """

    num_programs: int = 128
    chunk_words: int = 8192
    lag: int = 1
    num_warps: int = 8
    owns_parts: bool = True

    def part_words(self, num_ranks: int) -> int:
        """Words that a rank adds up in a turn, a power of two."""
        return triton.next_power_of_2(self.chunk_words // num_ranks) if self.owns_parts else self.chunk_words

    def slot_words(self, num_ranks: int) -> int:
        """Words that arrive for a program in a turn: each other rank's part, and each one's sum if they own parts."""
        return (1 + self.owns_parts) * (num_ranks - 1) * self.part_words(num_ranks)

    def num_flag_words(self, num_ranks: int) -> int:
        """Words of the flags, which an inbox begins with."""
        return self.num_programs * num_ranks * int(_FLAG_WORDS.value)

    def inbox_words(self, num_ranks: int) -> int:
        """Words of a rank's inbox."""
        num_slots = self.num_programs * 2 * self.lag
        return self.num_flag_words(num_ranks) + num_slots * self.slot_words(num_ranks)


def chunked_all_reduce(
    x: torch.Tensor,
    output: torch.Tensor,
    inboxes: torch.Tensor,
    turns: torch.Tensor,
    chunking: Chunking,
    *,
    rank: int,
    adds: bool = False,
) -> None:
    """Write the sum of all ranks' `x` to `output`, the same bits on every rank: added in float32 in order of ranks.

    All ranks must make the same calls in the same order.

    Args:
        x: contiguous, of whole words: an even number of 16-bit numbers.
        output: of the same size and format, contiguous; it may be `x` itself.
        inboxes: (ranks,) int64, the address of each rank's inbox, as this rank sees it: `chunking.inbox_words` words of
            4 bytes. Zeros before the first call.
        turns: (chunking.num_programs,) int32, how many turns each program has had. Zeros before the first call.
        chunking: the same in all calls.
        rank: this one.
        adds: the sum, rounded as it would be by itself, is added to what `output` holds.
    """
    num_ranks = len(inboxes)
    words, into = x.view(torch.int32), output.view(torch.int32)
    assert words.numel() == into.numel(), "one message"
    assert x.dtype == output.dtype, "numbers of one format"
    assert all(tensor.is_contiguous() for tensor in (x, output)), "words in the same order"
    part_words = chunking.part_words(num_ranks)
    num_chunks = triton.cdiv(words.numel(), part_words * (num_ranks if chunking.owns_parts else 1))
    _chunked_all_reduce[(min(num_chunks, chunking.num_programs),)](
        words, into, words.numel(), inboxes, turns, chunking.num_flag_words(num_ranks), RANK=rank,
        NUM_RANKS=num_ranks, NUM_PARTS=num_ranks if chunking.owns_parts else 1, DTYPE=triton_type(x.dtype), ADDS=adds,
        PART=part_words, LAG=chunking.lag, num_warps=chunking.num_warps, **launch_options(x.device),
    )  # fmt: skip


@triton.jit
def _chunked_all_reduce(
    x, output, num_words, inboxes, turns, num_flag_words,
    RANK: tl.constexpr, NUM_RANKS: tl.constexpr, NUM_PARTS: tl.constexpr, DTYPE: tl.constexpr, ADDS: tl.constexpr,
    PART: tl.constexpr, LAG: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: every num_programs-th chunk. It waits for nobody but the programs of its number on the other ranks.

    In its turn t it uses what the others have sent in their turns t - LAG, and its messages take the place of those
    that it sent in turn t - 2 LAG. The others have used those in their turns t - LAG, which it has seen the end of.
    Turns are counted from call to call, so that all this holds between the turns of two calls, too.
    """
    num_slots: tl.constexpr = 2 * LAG
    slot_words: tl.constexpr = (2 if NUM_PARTS > 1 else 1) * (NUM_RANKS - 1) * PART
    num_crossings: tl.constexpr = 2 if NUM_PARTS > 1 else 1
    wait_for_inputs(PDL)
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    own = _inbox(inboxes, RANK)
    flags = program * NUM_RANKS * _FLAG_WORDS
    slots = num_flag_words + program * num_slots * slot_words
    word = tl.arange(0, PART)
    first_turn = tl.load(turns + program)
    num_chunks = tl.cdiv(tl.cdiv(num_words, PART * NUM_PARTS) - program, num_programs)
    num_steps = num_chunks + num_crossings * LAG
    for step in range(num_steps):
        turn = first_turn + step
        _wait_for_others(own + flags, turn - LAG, RANK, NUM_RANKS)
        sending = slots + (turn & (num_slots - 1)) * slot_words
        arrived = own + slots + ((turn - LAG) & (num_slots - 1)) * slot_words
        if step < num_chunks:
            begin = (program + step * num_programs) * (NUM_PARTS * PART)
            for other in tl.static_range(NUM_RANKS):
                if other != RANK:
                    offsets = begin + other % NUM_PARTS * PART + word
                    part = tl.load(x + offsets, mask=offsets < num_words, other=0)
                    tl.store(_inbox(inboxes, other) + sending + _place(RANK, other) * PART + word, part)
        if (step >= LAG) & (step < num_chunks + LAG):
            begin = (program + (step - LAG) * num_programs) * (NUM_PARTS * PART)
            offsets = begin + RANK % NUM_PARTS * PART + word
            own_part = tl.load(x + offsets, mask=offsets < num_words, other=0)
            total = _sum(own_part, arrived + word, RANK, NUM_RANKS, DTYPE)
            if NUM_PARTS > 1:
                sums = sending + (NUM_RANKS - 1) * PART
                for other in tl.static_range(NUM_RANKS):
                    if other != RANK:
                        tl.store(_inbox(inboxes, other) + sums + _place(RANK, other) * PART + word, total)
            _write(output, offsets, num_words, total, DTYPE, ADDS)
        if NUM_PARTS > 1:
            begin = (program + (step - 2 * LAG) * num_programs) * (NUM_PARTS * PART)
            sums = arrived + (NUM_RANKS - 1) * PART + word
            if step >= 2 * LAG:
                for other in tl.static_range(NUM_RANKS):
                    if other != RANK:
                        total = tl.load(sums + _place(other, RANK) * PART, volatile=True)
                        _write(output, begin + other * PART + word, num_words, total, DTYPE, ADDS)
        tl.debug_barrier()  # every thread has used what has arrived, and has sent its share
        _raise_flags(inboxes, flags, turn, RANK, NUM_RANKS)
    tl.store(turns + program, first_turn + num_steps)


def chunked_gather(
    x: torch.Tensor,
    output: torch.Tensor,
    inboxes: torch.Tensor,
    turns: torch.Tensor,
    chunking: Chunking,
    *,
    rank: int,
) -> None:
    """Write all ranks' `x` beside each other to rank 0's `output`; nothing is written on the others.

    Args:
        x: (rows, size), contiguous, rows of whole words.
        output: (rows, ranks size), of the same format, contiguous; not used on other ranks than 0.
        inboxes, turns, chunking, rank: as in `chunked_all_reduce`, with whose calls these take turns.
    """
    num_ranks, part_words = len(inboxes), chunking.part_words(len(inboxes))
    words = x.view(torch.int32)
    num_rows, row_words = words.shape
    assert x.is_contiguous(), "words in order"
    num_chunks = num_rows * triton.cdiv(row_words, part_words)
    _chunked_gather[(min(num_chunks, chunking.num_programs),)](
        words, output.view(torch.int32), num_rows, row_words, inboxes, turns, chunking.num_flag_words(num_ranks),
        RANK=rank, NUM_RANKS=num_ranks, PART=part_words, SLOT_WORDS=chunking.slot_words(num_ranks), LAG=chunking.lag,
        num_warps=chunking.num_warps, **launch_options(x.device),
    )  # fmt: skip


@triton.jit
def _chunked_gather(
    x, output, num_rows, row_words, inboxes, turns, num_flag_words,
    RANK: tl.constexpr, NUM_RANKS: tl.constexpr, PART: tl.constexpr, SLOT_WORDS: tl.constexpr, LAG: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program: every num_programs-th chunk, a part of a row. It takes turns as `_chunked_all_reduce` does."""
    num_slots: tl.constexpr = 2 * LAG
    wait_for_inputs(PDL)
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    own = _inbox(inboxes, RANK)
    flags = program * NUM_RANKS * _FLAG_WORDS
    slots = num_flag_words + program * num_slots * SLOT_WORDS
    word = tl.arange(0, PART)
    first_turn = tl.load(turns + program)
    chunks_of_row = tl.cdiv(row_words, PART)
    num_chunks = tl.cdiv(num_rows * chunks_of_row - program, num_programs)
    for step in range(num_chunks + LAG):
        turn = first_turn + step
        _wait_for_others(own + flags, turn - LAG, RANK, NUM_RANKS)
        if step < num_chunks:
            chunk = program + step * num_programs
            column = chunk % chunks_of_row * PART + word
            part = tl.load(x + chunk // chunks_of_row * row_words + column, mask=column < row_words, other=0)
            if RANK == 0:
                row = output + chunk // chunks_of_row * (NUM_RANKS * row_words)
                tl.store(row + column, part, mask=column < row_words)
            else:
                sending = slots + (turn & (num_slots - 1)) * SLOT_WORDS
                tl.store(_inbox(inboxes, 0) + sending + _place(RANK, 0) * PART + word, part)
        if RANK == 0:
            arrived = own + slots + ((turn - LAG) & (num_slots - 1)) * SLOT_WORDS
            chunk = program + (step - LAG) * num_programs
            column = chunk % chunks_of_row * PART + word
            if step >= LAG:
                row = output + chunk // chunks_of_row * (NUM_RANKS * row_words)
                for other in tl.static_range(1, NUM_RANKS):
                    part = tl.load(arrived + _place(other, 0) * PART + word, volatile=True)
                    tl.store(row + other * row_words + column, part, mask=column < row_words)
        tl.debug_barrier()  # as there
        _raise_flags(inboxes, flags, turn, RANK, NUM_RANKS)
    tl.store(turns + program, first_turn + num_chunks + LAG)


@triton.jit
def _raise_flags(inboxes, flags, turn, RANK: tl.constexpr, NUM_RANKS: tl.constexpr):
    """Tell the others that this rank's turn is over."""
    for other in tl.static_range(NUM_RANKS):
        if other != RANK:
            tl.atomic_xchg(_inbox(inboxes, other) + flags + RANK * _FLAG_WORDS, turn + 1, sem="release", scope="sys")


@triton.jit
def _inbox(inboxes, rank):
    """A rank's inbox."""
    return tl.multiple_of(tl.load(inboxes + rank).to(tl.pointer_type(tl.int32)), 16)


@triton.constexpr_function
def _place(source, receiver):
    """Where a receiver keeps what a source has sent: in order of ranks, without a place for itself."""
    return source - (source > receiver)


@triton.jit
def _wait_for_others(flags, turn, RANK: tl.constexpr, NUM_RANKS: tl.constexpr):
    """Wait until the others' turn is over; the counts may wrap around."""
    for other in tl.static_range(NUM_RANKS):
        if other != RANK:
            while tl.atomic_add(flags + other * _FLAG_WORDS, 0, sem="acquire", scope="sys") - (turn + 1) < 0:
                pass


@triton.jit
def _sum(own_part, parts, RANK: tl.constexpr, NUM_RANKS: tl.constexpr, DTYPE: tl.constexpr):
    """Words of the sum of this rank's part and the others', which follow each other in its inbox."""
    size: tl.constexpr = own_part.shape[0]
    low = tl.zeros((size,), tl.float32)
    high = tl.zeros((size,), tl.float32)
    for rank in tl.static_range(NUM_RANKS):
        part = own_part if rank == RANK else tl.load(parts + _place(rank, RANK) * size, volatile=True)
        low += half_of(part, 0, DTYPE)
        high += half_of(part, 1, DTYPE)
    return word_of(low, high, DTYPE)


@triton.jit
def _write(output, offsets, num_words, total, DTYPE: tl.constexpr, ADDS: tl.constexpr):
    """Write words of the sum, or add them to what is there."""
    mask = offsets < num_words
    if ADDS:
        before = tl.load(output + offsets, mask=mask, other=0)
        total = added(before, total, DTYPE)
    tl.store(output + offsets, total, mask=mask)
