"""One-shot sum over the GPUs of a node through each other's memory, for messages that are too small for a library.

Every rank sends what it has straight into the others' memory, and adds up what came. A number and the count of the call
that it belongs to travel in one store of 8 bytes, which arrives whole, so that no barrier and no fence is needed: who
finds the count of this call has the number too (the "LL" protocol of NCCL, described in Hu et al. 2025, "Demystifying
NCCL", section 4). That doubles the bytes, and halves the time as long as these are few.
"""

import torch
import triton
import triton.language as tl

from llm.kernels.launch import launch_options, triton_type, wait_for_inputs

WORDS_PER_PROGRAM = 512
"""Words of 4 bytes that one program sends and sums. A program keeps its own place in every message, whatever its size:
so each counts its own calls, and none waits for another on its GPU."""


def all_reduce(
    x: torch.Tensor,
    output: torch.Tensor,
    inboxes: torch.Tensor,
    inbox: torch.Tensor,
    calls: torch.Tensor,
    *,
    rank: int,
    adds: bool = False,
) -> None:
    """Write the sum of all ranks' `x` to `output`, the same bits on every rank: added in float32 in order of ranks.

    All ranks must make the same calls in the same order.

    Args:
        x: contiguous, of whole words: an even number of 16-bit numbers.
        output: of the same size and format, contiguous; it may be `x` itself.
        inboxes: (ranks,) int64, the address of each rank's `inbox`, as this rank sees it.
        inbox: (2, ranks, words) int64, which the others write to: two, since a rank may send the next call's message
            while another one still reads the last, but never the one behind it. Zeros before the first call.
        calls: (programs,) int32, how many calls each program has seen. Zeros before the first call.
        rank: this one.
        adds: the sum, rounded as it would be by itself, is added to what `output` holds.
    """
    _, num_ranks, capacity = inbox.shape
    words, into = x.view(torch.int32), output.view(torch.int32)
    num_words = words.numel()
    assert num_words == into.numel() <= capacity, "a message that fits"
    assert x.dtype == output.dtype, "numbers of one format"
    assert all(tensor.is_contiguous() for tensor in (x, output)), "words in the same order"
    _all_reduce[(triton.cdiv(num_words, WORDS_PER_PROGRAM),)](
        words, into, num_words, inboxes, inbox, calls, capacity, RANK=rank, NUM_RANKS=num_ranks,
        DTYPE=triton_type(x.dtype), ADDS=adds, BLOCK=WORDS_PER_PROGRAM, num_warps=4, **launch_options(x.device),
    )  # fmt: skip


@triton.jit
def _all_reduce(
    x, output, num_words, inboxes, inbox, calls, capacity,
    RANK: tl.constexpr, NUM_RANKS: tl.constexpr, DTYPE: tl.constexpr, ADDS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK words of the message."""
    first = tl.load(inboxes + (RANK + 1) % NUM_RANKS)  # addresses do not change: this need not wait
    wait_for_inputs(PDL)
    program = tl.program_id(0)
    call = tl.load(calls + program) + 1
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_words
    words = tl.load(x + offsets, mask=mask, other=0)
    packets = (call.to(tl.int64) << 32) | (words.to(tl.int64) & 0xFFFFFFFF)
    half = (call & 1) * NUM_RANKS * capacity
    for step in tl.static_range(1, NUM_RANKS):
        address = first if step == 1 else tl.load(inboxes + (RANK + step) % NUM_RANKS)
        other = tl.multiple_of(address.to(tl.pointer_type(tl.int64)), 16)
        tl.store(other + half + RANK * capacity + offsets, packets, mask=mask)
    if ADDS:
        before = tl.load(output + offsets, mask=mask, other=0)
    low = tl.zeros((BLOCK,), tl.float32)
    high = tl.zeros((BLOCK,), tl.float32)
    for rank in tl.static_range(NUM_RANKS):
        part = words if rank == RANK else _received(inbox + half + rank * capacity + offsets, call, mask)
        low += half_of(part, 0, DTYPE)
        high += half_of(part, 1, DTYPE)
    total = word_of(low, high, DTYPE)
    if ADDS:
        total = added(before, total, DTYPE)
    tl.store(output + offsets, total, mask=mask)
    tl.store(calls + program, call)


@triton.jit
def _received(packets, call, mask):
    """The words that a rank sends in this call, once all of them are there."""
    received = tl.load(packets, mask=mask, other=0, volatile=True)
    while tl.max((mask & ((received >> 32).to(tl.int32) != call)).to(tl.int32), 0) != 0:
        received = tl.load(packets, mask=mask, other=0, volatile=True)
    return received.to(tl.int32)


@triton.jit
def half_of(words, PLACE: tl.constexpr, DTYPE: tl.constexpr):
    """One of the two 16-bit numbers of each word, as float32; a word of 32 bits is its own first half."""
    if tl.float32 == DTYPE:
        number = words.to(tl.float32, bitcast=True)
    else:
        number = (words >> (16 * PLACE)).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return number


@triton.jit
def word_of(low, high, DTYPE: tl.constexpr):
    """The other way round: rounded, and put into words."""
    if tl.float32 == DTYPE:
        word = low.to(tl.int32, bitcast=True)
    else:
        first = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        word = first | (high.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return word


@triton.jit
def added(words, others, DTYPE: tl.constexpr):
    """The numbers of two words each, added."""
    low = half_of(words, 0, DTYPE) + half_of(others, 0, DTYPE)
    high = half_of(words, 1, DTYPE) + half_of(others, 1, DTYPE)
    return word_of(low, high, DTYPE)
