"""Tiles of keys and values in 8 bits, from their pages to the tensor cores through nothing but registers.

The tensor cores take numbers of 16 bits, and of values in pairs of two tokens. A tile that is widened where it was loaded
has to be exchanged between threads for that, through shared memory, at two bytes a number and twice. But in which order a
product sums, and in which order its outputs stand, is free. So each thread loads, 16 bytes at a time, just what it hands
to the tensor cores, and the other operand and the outputs stand in the order that follows:

- a thread of a warp is (token g, quarter t) of keys: from each 64 numbers of 8 tokens it has the 16 of a quarter;
- and (tokens t, eighth g) of values: of each 16 tokens it has an eighth of the heads of four.

A tile is two runs of 16 tokens, each in one page.
"""

import triton
import triton.language as tl

RUN = 16
"""Tokens of a run."""
TILE = 2 * RUN
"""Tokens of a tile."""


def has_tiles(head_dim: int, page_size: int) -> bool:
    """Whether heads of this size, in pages of so many tokens, are read in such tiles."""
    return head_dim in (64, 128) and page_size % RUN == 0


@triton.jit
def run_offset(table, position, end, token_words, PAGE_SIZE: tl.constexpr):
    """Words before the run that begins at `position`, a multiple of `RUN`; those before page 0 for a run past `end`."""
    page = tl.load(table + position // PAGE_SIZE, mask=position < end, other=0).to(tl.int64)
    return (page * PAGE_SIZE + position % PAGE_SIZE) * token_words


@triton.jit
def load_key_words(pages, first, second, token_words, HEAD_DIM: tl.constexpr):
    """Keys of two runs at these offsets, as words of four: (t, g, 64 numbers, half of the run, run, word).

    Those of tokens that do not exist are whatever lies there.
    """
    quarter = tl.arange(0, 4)[:, None, None, None, None, None]
    token = tl.arange(0, 8)[None, :, None, None, None, None]
    part = tl.arange(0, HEAD_DIM // 64)[None, None, :, None, None, None]
    half = tl.arange(0, 2)[None, None, None, :, None, None]
    run = tl.arange(0, 2)[None, None, None, None, :, None]
    word = tl.arange(0, 4)[None, None, None, None, None, :]
    offsets = (half * 8 + token) * token_words + part * 16 + quarter * 4 + word
    return tl.load(pages + tl.where(run == 0, first, second) + offsets)


@triton.jit
def key_dims(HEAD_DIM: tl.constexpr):
    """Which number of a head stands at each place of `keys_of`: (HEAD_DIM,) int32."""
    place = tl.arange(0, HEAD_DIM)
    return place // 64 * 64 + place // 4 % 4 * 16 + place // 16 % 4 * 4 + place % 4


@triton.jit
def keys_of(words, HEAD_DIM: tl.constexpr, BY_CHIP: tl.constexpr):
    """The tile's keys: (HEAD_DIM, 32) float16, a column for each token."""
    n0, n1, n2, n3 = _widen(words, BY_CHIP)
    numbers = tl.join(tl.join(n0, n1), tl.join(n2, n3))  # (t, g, part, half, run, word, number's bit 0, bit 1)
    return tl.reshape(tl.permute(numbers, (2, 5, 0, 7, 6, 4, 3, 1)), (HEAD_DIM, 32))


@triton.jit
def weights_of(scores, HEADS: tl.constexpr):
    """Weights (HEADS, 32) in the order of `values_of`: neighbours in a thread's registers stay neighbours."""
    apart = tl.reshape(scores, (HEADS, 2, 2, 4, 2))  # (head, run, half, t, neighbour)
    return tl.reshape(tl.permute(apart, (0, 1, 3, 2, 4)), (HEADS, 32))


@triton.jit
def load_value_words(pages, first, second, start, begin, end, token_words, HEAD_DIM: tl.constexpr):
    """Values of two runs, as words of four: (t, g, half of the run, run, word), of even tokens and of odd ones.

    The runs begin at `start`; zeros for tokens before `begin` or not before `end`.
    """
    pair = tl.arange(0, 4)[:, None, None, None, None]
    eighth = tl.arange(0, 8)[None, :, None, None, None]
    half = tl.arange(0, 2)[None, None, :, None, None]
    run = tl.arange(0, 2)[None, None, None, :, None]
    word = tl.arange(0, HEAD_DIM // 32)[None, None, None, None, :]
    token = half * 8 + pair * 2
    pointers = pages + tl.where(run == 0, first, second) + token * token_words + eighth * (HEAD_DIM // 32) + word
    position = start + run * 16 + token
    even = tl.load(pointers, mask=(position >= begin) & (position < end), other=0)
    odd = tl.load(pointers + token_words, mask=(position + 1 >= begin) & (position + 1 < end), other=0)
    return even, odd


@triton.jit
def value_dims(HEAD_DIM: tl.constexpr):
    """Which number of a head stands at each place of `values_of`: (HEAD_DIM,) int32."""
    place = tl.arange(0, HEAD_DIM)
    return place % 8 * (HEAD_DIM // 8) + place // 8


@triton.jit
def values_of(even, odd, HEAD_DIM: tl.constexpr, BY_CHIP: tl.constexpr):
    """The tile's values: (32, HEAD_DIM) float16, a row for each token."""
    e0, o0, e1, o1, e2, o2, e3, o3 = _widen_pairs(even, odd, BY_CHIP)
    low = tl.join(tl.join(e0, o0), tl.join(e1, o1))
    high = tl.join(tl.join(e2, o2), tl.join(e3, o3))
    numbers = tl.join(low, high)  # (t, g, half, run, word, odd, number's bit 0, bit 1)
    return tl.reshape(tl.permute(numbers, (3, 0, 2, 5, 4, 7, 6, 1)), (32, HEAD_DIM))


@triton.jit
def _widen(words, BY_CHIP: tl.constexpr):
    """The four E4M3 of each word as float16."""
    if BY_CHIP:
        numbers = tl.inline_asm_elementwise(
            """{ .reg .b16 low, high; .reg .b32 two; mov.b32 {low, high}, $4;
            cvt.rn.f16x2.e4m3x2 two, low; mov.b32 {$0, $1}, two;
            cvt.rn.f16x2.e4m3x2 two, high; mov.b32 {$2, $3}, two; }""",
            "=h,=h,=h,=h,r", [words], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        numbers = _number(words, 0), _number(words, 1), _number(words, 2), _number(words, 3)
    return numbers


@triton.jit
def _widen_pairs(even, odd, BY_CHIP: tl.constexpr):
    """The four E4M3 of each two words as float16, by turns. Their bytes are put in pairs while four fit a register."""
    if BY_CHIP:
        numbers = tl.inline_asm_elementwise(
            """{ .reg .b16 low, high; .reg .b32 four, two;
            prmt.b32 four, $8, $9, 0x5140; mov.b32 {low, high}, four;
            cvt.rn.f16x2.e4m3x2 two, low; mov.b32 {$0, $1}, two;
            cvt.rn.f16x2.e4m3x2 two, high; mov.b32 {$2, $3}, two;
            prmt.b32 four, $8, $9, 0x7362; mov.b32 {low, high}, four;
            cvt.rn.f16x2.e4m3x2 two, low; mov.b32 {$4, $5}, two;
            cvt.rn.f16x2.e4m3x2 two, high; mov.b32 {$6, $7}, two; }""",
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [even, odd],
            dtype=(
                tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16,
            ), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        numbers = (
            _number(even, 0), _number(odd, 0), _number(even, 1), _number(odd, 1),
            _number(even, 2), _number(odd, 2), _number(even, 3), _number(odd, 3),
        )  # fmt: skip
    return numbers


@triton.jit
def _number(words, which):
    """The E4M3 at byte `which` of each word, as float16: the same bits but for the exponent, which counts from -7."""
    byte = words >> (8 * which)
    half = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
    return half.to(tl.int16).to(tl.float16, bitcast=True) * 256.0
