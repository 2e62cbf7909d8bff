"""Tiles of keys and values in 8 bits, from their pages to the tensor cores through nothing but registers.

Tensor cores take numbers of 16 bits, and those of values as pairs of two tokens. A tile that is widened where it was
loaded has to be exchanged between threads for that, through shared memory, at two bytes a number. But the order in
which a product sums is free, and so is the order of its outputs. So each thread loads, 16 bytes at a time, just what it
hands to the tensor cores, and queries, tokens and outputs stand in the order that follows from that. The thread
t + 4 g of a warp has

- of keys, of the tokens that `tile_tokens` puts in rows g and g + 8 of each run: quarter t of each 64 numbers;
- of values, of tokens 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of each run: eighth g of the head.

A tile is two runs of 16 tokens, each within one page.
"""

import triton
import triton.language as tl

_RUN = 16


def has_tiles(head_dim: int, page_size: int) -> bool:
    """Whether heads of this size, in pages of so many tokens, are read in such tiles."""
    return head_dim in (64, 128, 256) and page_size % _RUN == 0


@triton.jit
def run_offset(table, position, end, token_words, PAGE_SIZE: tl.constexpr):
    """Words of four numbers before the run that begins at `position`, a multiple of 16. A run from `end` on: page 0."""
    page = tl.load(table + position // PAGE_SIZE, mask=position < end, other=0).to(tl.int64)
    return (page * PAGE_SIZE + position % PAGE_SIZE) * token_words


@triton.jit
def tile_tokens():
    """Which token of a tile stands in each row of `keys_of`, and in each column of `values_of`: (32,) int32."""
    place = tl.arange(0, 32)
    return place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2


@triton.jit
def load_key_words(pages, first, second, token_words, HEAD_DIM: tl.constexpr):
    """Keys of the runs at these offsets: (t, g, every 64 numbers, whether from row 8 on, run, words of four numbers).

    Those of tokens that do not exist are whatever lies there.
    """
    quarter = tl.arange(0, 4)[:, None, None, None, None, None]
    low = tl.arange(0, 8)[None, :, None, None, None, None]
    part = tl.arange(0, HEAD_DIM // 64)[None, None, :, None, None, None]
    high = tl.arange(0, 2)[None, None, None, :, None, None]
    run = tl.arange(0, 2)[None, None, None, None, :, None]
    word = tl.arange(0, 4)[None, None, None, None, None, :]
    token = low // 2 % 2 * 8 + high * 4 + low // 4 * 2 + low % 2  # as in `tile_tokens`
    offsets = token * token_words + part * 16 + quarter * 4 + word
    return tl.load(pages + tl.where(run == 0, first, second) + offsets)


@triton.jit
def key_dims(HEAD_DIM: tl.constexpr):
    """Which number of a head stands in each column of `keys_of`: (HEAD_DIM,) int32."""
    place = tl.arange(0, HEAD_DIM)
    return place // 64 * 64 + place // 4 % 4 * 16 + place // 16 % 4 * 4 + place % 4


@triton.jit
def keys_of(words, HEAD_DIM: tl.constexpr, BY_CHIP: tl.constexpr):
    """The tile's keys: (32, HEAD_DIM) float16, in the order of `tile_tokens` and `key_dims`."""
    n0, n1, n2, n3 = _widen(words, BY_CHIP)
    numbers = tl.join(tl.join(n0, n1), tl.join(n2, n3))  # …, bit 0 and bit 1 of the number in its word
    return tl.reshape(tl.permute(numbers, (4, 3, 1, 2, 5, 0, 7, 6)), (32, HEAD_DIM))


@triton.jit
def load_value_words(pages, first, second, start, begin, end, token_words, HEAD_DIM: tl.constexpr):
    """Values of even tokens and of odd ones: (t, g, half of the run, run, words of four numbers) each.

    The tile begins at position `start`; zeros for tokens before `begin`, and for those from `end` on.
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
    """Which number of a head stands in each row of `values_of`: (HEAD_DIM,) int32."""
    place = tl.arange(0, HEAD_DIM)
    return place % 8 * (HEAD_DIM // 8) + place // 8


@triton.jit
def values_of(even, odd, HEAD_DIM: tl.constexpr, BY_CHIP: tl.constexpr):
    """The tile's values: (HEAD_DIM, 32) float16, in the order of `value_dims` and `tile_tokens`."""
    e0, o0, e1, o1, e2, o2, e3, o3 = _widen_pairs(even, odd, BY_CHIP)
    low = tl.join(tl.join(e0, o0), tl.join(e1, o1))
    high = tl.join(tl.join(e2, o2), tl.join(e3, o3))
    numbers = tl.join(low, high)  # …, whether odd, bit 0 and bit 1 of the number
    return tl.reshape(tl.permute(numbers, (4, 7, 6, 1, 3, 0, 2, 5)), (HEAD_DIM, 32))


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
