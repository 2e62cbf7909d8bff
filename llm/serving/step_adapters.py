"""Which tokens of a step have which adapter, as the kernels take it."""

import numpy as np

from llm.serving.step_arrays import Int32Array, ranges


def group_by_adapter(slots: Int32Array, ranks: Int32Array, rows: int) -> tuple[Int32Array, Int32Array]:
    """Group the tokens of a step by their adapters.

    Args:
        slots: (tokens,), the slot of each token's adapter; negative for none.
        ranks: (slots,), the rank of the adapter in each slot.
        rows: most tokens of an entry.

    Returns:
        The indices of the tokens with an adapter, those of an adapter together; and the entries, (entries, 4): slot,
        first token in this order, number of tokens, rank.
    """
    order = slots.argsort(kind="stable").astype(np.int32)
    order = order[np.count_nonzero(slots < 0) :]
    found, firsts, counts = np.unique(slots[order], return_index=True, return_counts=True)
    if not len(found):
        return order, np.zeros((0, 4), np.int32)
    num_entries = (-(-counts // rows)).astype(np.int32)
    within = ranges(np.zeros_like(num_entries), num_entries) * rows
    entries = np.empty((len(within), 4), np.int32)
    entries[:, 0] = found.repeat(num_entries)
    entries[:, 1] = firsts.repeat(num_entries) + within
    entries[:, 2] = np.minimum(counts.repeat(num_entries) - within, rows)
    entries[:, 3] = ranks[entries[:, 0]]
    return order, entries
