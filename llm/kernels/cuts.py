"""Where top-k, top-p and min-p cut a row of logits, without sorting it.

A cut is the lowest logit above which there are few enough tokens and little enough mass. It is sought by bisection
over integers that are ordered as floats are: over the whole row, four thresholds a pass, until few candidates are
left; then among those alone. Functions for a program that has one row to itself.
"""

import torch
import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-3.0e38)
_STAGES = tl.constexpr(3)
"""Of the loops over logits: while one tile is looked at, the next two are on their way."""

KEY_SHIFT = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
"""Low bits that are zero in the float32 of every such number, so that keys need not tell them apart."""


@triton.jit
def row_threshold(
    logits, vocab_size, temperature, top_k, top_p, min_p, highest, lowest, num_finite, mass, candidates,
    CAPACITY: tl.constexpr, TILE: tl.constexpr, VEC: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The lowest logit that the cuts of a row leave in.

    `highest` to `mass` are from `softmax_stats` at scale log2(e) / temperature, with at least one finite logit;
    `candidates` is scratch memory for CAPACITY float32.
    """
    scale = _LOG2_E / temperature
    below = ordered_key(lowest, SHIFT) - 1
    below = tl.where(below == -1, -2, below)  # -1 is the key of -0.0, which is no less than 0.0
    low = below
    num_found = 0
    if (top_k > 0) & (top_k < num_finite):
        low, num_finite, mass, num_found = _find_cut(
            logits, vocab_size, highest, scale, low, num_finite, mass, top_k, float("inf"), 1.0, candidates, num_found,
            CAPACITY, TILE, VEC, SHIFT,
        )  # fmt: skip
    if top_p < 1:
        low, num_finite, mass, num_found = _find_cut(
            logits, vocab_size, highest, scale, low, num_finite, mass, vocab_size + 1, top_p * mass, temperature,
            candidates, num_found, CAPACITY, TILE, VEC, SHIFT,
        )  # fmt: skip
    # The reference cuts what the temperature has divided, where logits next to each other may have become equal.
    limit = tl.div_rn(value_of_key(low + 1, SHIFT), temperature)
    if min_p > 0:
        limit = tl.maximum(limit, tl.div_rn(highest, temperature) + tl.log(min_p))
    low = below
    high = ordered_key(highest, SHIFT)
    while high - low > 1:
        middle = (low + high) >> 1
        is_kept = tl.div_rn(value_of_key(middle, SHIFT), temperature) >= limit
        low = tl.where(is_kept, low, middle)
        high = tl.where(is_kept, middle, high)
    return value_of_key(high, SHIFT)


@triton.jit
def softmax_stats(logits, vocab_size, scale, TILE: tl.constexpr, VEC: tl.constexpr):
    """One pass: highest and lowest finite logit, number of them, and sum of 2^(scale * (logit - highest)).

    The sum is rescaled whenever the highest changes (Milakov & Gimelshein 2018, arXiv:1805.02867).
    """
    highest = tl.full([TILE // VEC], _LOWEST, tl.float32)
    lowest = tl.full([TILE // VEC], float("inf"), tl.float32)
    count = tl.zeros([TILE // VEC], tl.int32)
    mass = tl.zeros([TILE // VEC], tl.float32)
    for start in tl.range(0, vocab_size, TILE, num_stages=_STAGES):
        x = _load_tile(logits, vocab_size, start, TILE, VEC)
        new_highest = tl.maximum(highest, tl.max(x, 1))
        mass *= tl.exp2((highest - new_highest) * scale)
        mass += tl.sum(tl.exp2((x - new_highest[:, None]) * scale), 1)
        highest = new_highest
        is_finite = x > -float("inf")
        lowest = tl.minimum(lowest, tl.min(tl.where(is_finite, x, float("inf")), 1))
        count += tl.sum(is_finite.to(tl.int32), 1)
    row_highest = tl.max(highest, 0)
    mass = tl.sum(mass * tl.exp2((highest - row_highest) * scale), 0)
    return row_highest, tl.min(lowest, 0), tl.sum(count, 0), mass


@triton.jit
def _find_cut(
    logits, vocab_size, highest, scale, low, num_low, mass_low, most_tokens, most_mass, unit, candidates, num_found,
    CAPACITY: tl.constexpr, TILE: tl.constexpr, VEC: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Find the lowest key above which there are fewer tokens than `most_tokens` and less mass than `most_mass`.

    `low` is a key known to be too low, `num_low` and `mass_low` what is above it. Returned are the same three for the
    highest key that is too low, the one before the key sought. `num_found`, given and returned, is 0 or the number of
    candidates, which then hold every logit above `low`.
    """
    high = ordered_key(highest, SHIFT)
    num_high = 0
    mass_high = 0.0
    num_beside = 0  # tokens above the bracket that the candidates leave out, and their mass
    mass_beside = 0.0
    has_all = num_found > 0
    if num_found == 0:
        wants_all = most_tokens <= CAPACITY // 2
        reach = 12 * unit  # Most cuts lie within a few units of the highest logit, so that is where to look first.
        while (high - low > 1) & (num_low - tl.where(wants_all, 0, num_high) > CAPACITY):
            # Three thresholds evenly spaced by value find the cut soonest; one halfway by key bounds the passes.
            top = value_of_key(high, SHIFT)
            step = tl.minimum(top - value_of_key(low, SHIFT), reach) * 0.25
            reach = float("inf")
            key0 = _clamp(ordered_key(top - 3 * step, SHIFT), low, high)
            key1 = _clamp(ordered_key(top - 2 * step, SHIFT), low, high)
            key2 = _clamp(ordered_key(top - step, SHIFT), low, high)
            key3 = (low + high) >> 1
            n0, m0, n1, m1, n2, m2, n3, m3 = _above(
                logits, vocab_size, highest, scale, value_of_key(key0, SHIFT), value_of_key(key1, SHIFT),
                value_of_key(key2, SHIFT), value_of_key(key3, SHIFT), TILE, VEC,
            )  # fmt: skip
            low, num_low, mass_low, high, num_high, mass_high = _narrow(
                low, num_low, mass_low, high, num_high, mass_high, key0, n0, m0, most_tokens, most_mass
            )
            low, num_low, mass_low, high, num_high, mass_high = _narrow(
                low, num_low, mass_low, high, num_high, mass_high, key1, n1, m1, most_tokens, most_mass
            )
            low, num_low, mass_low, high, num_high, mass_high = _narrow(
                low, num_low, mass_low, high, num_high, mass_high, key2, n2, m2, most_tokens, most_mass
            )
            low, num_low, mass_low, high, num_high, mass_high = _narrow(
                low, num_low, mass_low, high, num_high, mass_high, key3, n3, m3, most_tokens, most_mass
            )
        if high - low > 1:
            has_all = num_low <= CAPACITY
            up_to = tl.where(has_all, highest, value_of_key(high, SHIFT))
            num_beside = tl.where(has_all, 0, num_high)
            mass_beside = tl.where(has_all, 0.0, mass_high)
            num_found = _gather(logits, vocab_size, value_of_key(low, SHIFT), up_to, candidates, TILE, VEC)
    if high - low > 1:
        slot = tl.arange(0, CAPACITY)
        found = tl.load(candidates + slot, mask=slot < num_found, other=-float("inf"))
        weight = tl.exp2((found - highest) * scale)
        while (high - low > 1) & (num_low - num_high > 1):
            middle = (low + high) >> 1
            is_above = found > value_of_key(middle, SHIFT)
            count = num_beside + tl.sum(is_above.to(tl.int32), 0)
            mass = mass_beside + tl.sum(tl.where(is_above, weight, 0.0), 0)
            low, num_low, mass_low, high, num_high, mass_high = _narrow(
                low, num_low, mass_low, high, num_high, mass_high, middle, count, mass, most_tokens, most_mass
            )
        if high - low > 1:  # A single token is left between them: the cut is there.
            token = tl.max(tl.where(found <= value_of_key(high, SHIFT), found, -float("inf")), 0)
            low = ordered_key(token, SHIFT) - 1
    return low, num_low, mass_low, tl.where(has_all, num_found, 0)


@triton.jit
def _narrow(low, num_low, mass_low, high, num_high, mass_high, key, count, mass, most_tokens, most_mass):
    """Move one end of the bracket to `key`, above which there are `count` tokens of `mass`, if that narrows it."""
    is_enough = (count < most_tokens) & (mass < most_mass)
    to_high = is_enough & (key < high)
    to_low = (is_enough == 0) & (key > low)
    low = tl.where(to_low, key, low)
    num_low = tl.where(to_low, count, num_low)
    mass_low = tl.where(to_low, mass, mass_low)
    high = tl.where(to_high, key, high)
    num_high = tl.where(to_high, count, num_high)
    mass_high = tl.where(to_high, mass, mass_high)
    return low, num_low, mass_low, high, num_high, mass_high


@triton.jit
def _above(logits, vocab_size, highest, scale, t0, t1, t2, t3, TILE: tl.constexpr, VEC: tl.constexpr):
    """One pass: number and mass of the logits above each of four thresholds."""
    n0 = tl.zeros([TILE // VEC], tl.int32)
    n1 = tl.zeros([TILE // VEC], tl.int32)
    n2 = tl.zeros([TILE // VEC], tl.int32)
    n3 = tl.zeros([TILE // VEC], tl.int32)
    m0 = tl.zeros([TILE // VEC], tl.float32)
    m1 = tl.zeros([TILE // VEC], tl.float32)
    m2 = tl.zeros([TILE // VEC], tl.float32)
    m3 = tl.zeros([TILE // VEC], tl.float32)
    for start in tl.range(0, vocab_size, TILE, num_stages=_STAGES):
        x = _load_tile(logits, vocab_size, start, TILE, VEC)
        weight = tl.exp2((x - highest) * scale)
        n0 += tl.sum((x > t0).to(tl.int32), 1)
        n1 += tl.sum((x > t1).to(tl.int32), 1)
        n2 += tl.sum((x > t2).to(tl.int32), 1)
        n3 += tl.sum((x > t3).to(tl.int32), 1)
        m0 += tl.sum(tl.where(x > t0, weight, 0.0), 1)
        m1 += tl.sum(tl.where(x > t1, weight, 0.0), 1)
        m2 += tl.sum(tl.where(x > t2, weight, 0.0), 1)
        m3 += tl.sum(tl.where(x > t3, weight, 0.0), 1)
    return (
        tl.sum(n0, 0), tl.sum(m0, 0), tl.sum(n1, 0), tl.sum(m1, 0),
        tl.sum(n2, 0), tl.sum(m2, 0), tl.sum(n3, 0), tl.sum(m3, 0),
    )  # fmt: skip


@triton.jit
def _gather(logits, vocab_size, low, high, candidates, TILE: tl.constexpr, VEC: tl.constexpr):
    """Two passes: write the logits above `low` up to `high` side by side, in a fixed order; return their number."""
    count = tl.zeros([TILE // VEC], tl.int32)
    for start in tl.range(0, vocab_size, TILE, num_stages=_STAGES):
        x = _load_tile(logits, vocab_size, start, TILE, VEC)
        count += tl.sum(((x > low) & (x <= high)).to(tl.int32), 1)
    slot = tl.cumsum(count, 0) - count
    tl.debug_barrier()  # until every thread has read what an earlier cut left there
    for start in tl.range(0, vocab_size, TILE, num_stages=_STAGES):
        x = _load_tile(logits, vocab_size, start, TILE, VEC)
        is_inside = ((x > low) & (x <= high)).to(tl.int32)
        tl.store(candidates + (slot[:, None] + tl.cumsum(is_inside, 1) - is_inside), x, mask=is_inside > 0)
        slot += tl.sum(is_inside, 1)
    tl.debug_barrier()  # until every thread's are written
    return tl.sum(count, 0)


@triton.jit
def _load_tile(logits, vocab_size, start, TILE: tl.constexpr, VEC: tl.constexpr):
    """Logits as (TILE / VEC, VEC) float32, -inf past the end. A row of it is one load of one thread."""
    column = start + tl.arange(0, TILE)
    x = tl.load(logits + column, mask=column < vocab_size, other=-float("inf"))
    return tl.reshape(x.to(tl.float32), [TILE // VEC, VEC])


@triton.jit
def ordered_key(value, SHIFT: tl.constexpr):
    """An int64 ordered as the float32 is; with SHIFT, of the greatest number up to it that has SHIFT low zero bits."""
    bits = value.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT).to(tl.int64)


@triton.jit
def value_of_key(key, SHIFT: tl.constexpr):
    """The number of a key."""
    bits = (key << SHIFT).to(tl.int32)
    bits = tl.where(bits < 0, bits | ((1 << SHIFT) - 1), bits)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _clamp(key, low, high):
    """`key`, or the nearest strictly between `low` and `high`."""
    return tl.minimum(tl.maximum(key, low + 1), high - 1)
