"""How kernels read a row's `ROW_FIELDS`."""

import triton
import triton.language as tl

from llm.core.row_tensors import ROW_FIELDS, RowKind


def _word(name: str) -> tl.constexpr:
    """Where a field stands in its row, in words."""
    assert ROW_FIELDS.fields is not None
    return tl.constexpr(ROW_FIELDS.fields[name][1] // 4)


TEMPERATURE, TOP_K, TOP_P, MIN_P = map(_word, ("temperature", "top_k", "top_p", "min_p"))
REPETITION, PRESENCE, FREQUENCY = map(_word, ("repetition_penalty", "presence_penalty", "frequency_penalty"))
KIND, NUM_BIASES, NUM_BANS, BANNED_BEFORE = map(_word, ("kind", "num_biases", "num_bans", "banned_before"))
NUM_LOGPROBS, NUM_PROMPT_LOGPROBS, SEED = map(_word, ("num_logprobs", "num_prompt_logprobs", "seed"))
ARE_TOP_ALLOWED = _word("are_top_allowed")
PENALISED, HAS_ENTRIES, BOUND = (tl.constexpr(int(kind)) for kind in RowKind)
_WORDS = tl.constexpr(ROW_FIELDS.itemsize // 4)


@triton.jit
def int_field(fields, row, FIELD: tl.constexpr):
    """A field that is a whole number of 32 bits."""
    return tl.load(fields + row * _WORDS + FIELD)


@triton.jit
def float_field(fields, row, FIELD: tl.constexpr):
    """A field that is a float32."""
    return tl.load(fields + row * _WORDS + FIELD).to(tl.float32, bitcast=True)


@triton.jit
def seed_field(fields, row):
    """The seed, as uint64."""
    low = tl.load(fields + row * _WORDS + SEED).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(fields + row * _WORDS + SEED + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    return low | (high << 32)
