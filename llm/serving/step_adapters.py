"""Which tokens of a step have which adapter, as the kernels take it."""

from collections.abc import Mapping

import numpy as np

from llm.kernels.adapters import ENTRY_FIELDS, AdapterEntries, entry_rows, most_entries
from llm.models.adapters import NO_ADAPTER, AdapterMemory
from llm.models.kernel_adapters import PackedAdapters
from llm.serving.step_arrays import Int32Array, ranges
from llm.serving.step_inputs import StepInputs, fill


class StepAdapters:
    """Writes the adapters of a step's tokens to a step's inputs, and names them there.

    Args:
        memory: the slots.
        most_tokens: tokens of the largest step, or that are kept in it.
        deterministic: see `KernelWorkspace`.
    """

    def __init__(self, memory: AdapterMemory, most_tokens: int, *, deterministic: bool) -> None:
        self._memory = memory
        self._deterministic = deterministic
        # Steps of fewer tokens may have shorter entries, and so more of them.
        num_entries = max(map(self._most_entries, range(1, most_tokens + 1)))
        sizes = {
            "order": most_tokens, "entries": ENTRY_FIELDS * num_entries, "slots": most_tokens,
            "active": 1 + len(memory),
        }  # fmt: skip
        self._step = 0
        by_kind = {f"{kind}_{field}": size for kind in _KINDS for field, size in sizes.items()}
        self.sizes = {**by_kind, _STEP: 1}
        """Number of elements of each field of `StepInputs`."""

    def fill(
        self, inputs: Mapping[str, Int32Array], slots: Int32Array, kept: Int32Array, num_tokens: int, num_kept: int
    ) -> None:
        """Write the adapters of a step.

        Args:
            slots: (tokens,), the slot of each token's adapter.
            kept: (kept,), indices of the tokens that are kept.
            num_tokens, num_kept: what they are padded to.
        """
        self._step = (self._step + 1) % _STEPS
        inputs[_STEP][0] = self._step
        self._fill(inputs, _TOKENS, slots, num_tokens)
        self._fill(inputs, _KEPT, slots[kept], num_kept)

    def of(self, inputs: StepInputs, num_tokens: int, num_kept: int) -> PackedAdapters:
        """The adapters of a step padded to so many tokens."""
        return PackedAdapters(self._named(inputs, _TOKENS, num_tokens), self._named(inputs, _KEPT, num_kept))

    def _fill(self, inputs: Mapping[str, Int32Array], kind: str, slots: Int32Array, padded: int) -> None:
        fill(inputs[f"{kind}_slots"], slots, padded, NO_ADAPTER)
        slots = inputs[f"{kind}_slots"][:padded]
        order, entries = group_by_adapter(slots, self._memory.ranks, self._rows(padded))
        inputs[f"{kind}_order"][:padded] = order
        fill(inputs[f"{kind}_entries"], entries.reshape(-1), ENTRY_FIELDS * self._most_entries(padded), 0)
        active = np.unique(entries[entries[:, 3] > 0, 0])  # few numbers: the tokens have been sorted already
        inputs[f"{kind}_active"][0] = len(active)
        inputs[f"{kind}_active"][1 : 1 + len(active)] = active

    def _named(self, inputs: StepInputs, kind: str, padded: int) -> AdapterEntries:
        num_entries = self._most_entries(padded)
        entries = inputs[f"{kind}_entries"][: ENTRY_FIELDS * num_entries].view(num_entries, ENTRY_FIELDS)
        order, slots = (inputs[f"{kind}_{field}"][:padded] for field in ("order", "slots"))
        active = inputs[f"{kind}_active"][: 1 + len(self._memory)]
        return AdapterEntries(order, entries, self._rows(padded), slots, active, inputs[_STEP])

    def _rows(self, num_tokens: int) -> int:
        return entry_rows(num_tokens, deterministic=self._deterministic)

    def _most_entries(self, num_tokens: int) -> int:
        return most_entries(num_tokens, len(self._memory), self._rows(num_tokens))


_TOKENS, _KEPT = _KINDS = "adapters", "kept_adapters"
"""Fields of all tokens, and of those that are kept, begin so."""
_STEP = "adapters_step"
_STEPS = 1 << 16
"""So many steps have different numbers."""


def group_by_adapter(slots: Int32Array, ranks: Int32Array, rows: int) -> tuple[Int32Array, Int32Array]:
    """Group the tokens of a step by their adapters.

    Args:
        slots: (tokens,), the slot of each token's adapter, `NO_ADAPTER` for none.
        ranks: (slots,), the rank of the adapter in each slot.
        rows: most tokens of an entry.

    Returns:
        The indices of all tokens, those of an adapter together; and the entries, (entries, 4): slot, first token in
        this order, number of tokens, rank. Tokens without an adapter have entries of rank 0.
    """
    order = slots.argsort(kind="stable").astype(np.int32)
    found, firsts, counts = np.unique(slots[order], return_index=True, return_counts=True)
    num_entries = (-(-counts // rows)).astype(np.int32)
    within = ranges(np.zeros_like(num_entries), num_entries) * rows
    entries = np.empty((len(within), ENTRY_FIELDS), np.int32)
    entries[:, 0] = np.maximum(found, 0).repeat(num_entries)
    entries[:, 1] = firsts.repeat(num_entries) + within
    entries[:, 2] = np.minimum(counts.repeat(num_entries) - within, rows)
    entries[:, 3] = np.where(found == NO_ADAPTER, 0, ranks[found]).repeat(num_entries)
    return order, entries
