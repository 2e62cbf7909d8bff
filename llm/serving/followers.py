"""What ranks 1 and up do in a step: run their part of the model, like rank 0's runner, but draw nothing.

They join every collective that rank 0's runner joins, in the same order: those of the layers, and the gathering of
logits for draws and for log probabilities of prompts. On a GPU they also receive the tokens that rank 0 has drawn,
because the next step may be launched before the host has read them.
"""

from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch

from llm.attention.paged import PagedAttentionBackend, PagedContext
from llm.core.paged_kv_cache import PagedKVCache
from llm.core.recurrent_state import RecurrentStates
from llm.models.adapters import AdapterMemory
from llm.models.decoder import DecoderModel
from llm.serving.model_runner import MAX_SCORED_AT_ONCE, pack_batch, token_adapters
from llm.serving.step_arrays import Int32Array, StepArrays, batches


@dataclass(frozen=True, slots=True)
class RankStep:
    """What a rank has to know about a step.

    Attributes:
        arrays: the step's arrays.
        page_indices: places that change in the page tables, (groups, rows, pages) flattened.
        pages: the new pages at these places.
        draws_plainly: whether none of the draws needs more than temperature, cuts and noise.
    """

    arrays: StepArrays
    page_indices: Int32Array
    pages: Int32Array
    draws_plainly: bool

    def to_arrays(self) -> list[Int32Array]:
        """All of its data as arrays."""
        return [*self.arrays.fields(), self.page_indices, self.pages, np.array([self.draws_plainly], dtype=np.int32)]

    @classmethod
    def num_arrays(cls) -> int:
        """How many arrays `to_arrays` returns."""
        return StepArrays.num_fields() + 3

    @classmethod
    def from_arrays(cls, arrays: list[Int32Array]) -> Self:
        """The reverse of `to_arrays`."""
        *fields, page_indices, pages, draws_plainly = arrays
        return cls(StepArrays(*fields), page_indices, pages, bool(draws_plainly[0]))


class Follower(Protocol):
    """A rank's runner."""

    @property
    def adapters(self) -> AdapterMemory | None:
        """Slots for this rank's part of the adapters that requests choose; None if they cannot."""
        ...

    def follow(self, step: RankStep) -> None:
        """Run a step that rank 0 has launched."""
        ...

    def run_largest(self, num_tokens: int) -> None:
        """Run the largest step, as rank 0's runner does."""
        ...

    def warm_up(self) -> None:
        """Warm up, as rank 0's runner does."""
        ...


class EagerFollower:
    """The counterpart of an `EagerRunner` on another rank.

    Args:
        model: in evaluation mode, on its device.
        kv_cache: memory of the slot pool, on the same device.
        backend: paged attention.
        max_rows: rows that the scheduler hands out.
        max_seq_len: longest sequence in tokens.
        num_snapshots: see `RecurrentStates`.
        adapters: see `Follower.adapters`.
    """

    def __init__(
        self,
        model: DecoderModel,
        kv_cache: PagedKVCache,
        backend: PagedAttentionBackend,
        *,
        max_rows: int,
        max_seq_len: int,
        num_snapshots: int = 0,
        adapters: AdapterMemory | None = None,
    ) -> None:
        self._model = model
        self.adapters = adapters
        self._kv_cache = kv_cache
        self._backend = backend
        self._states = RecurrentStates(model.delta_specs, max_rows, model.device, model.dtype, num_snapshots)
        table_len = -(-max_seq_len // kv_cache.page_size)
        self._page_tables = np.full((kv_cache.num_groups, max_rows + 1, table_len), kv_cache.scratch_page, np.int64)
        self._last_token_ids = torch.zeros(max_rows, dtype=torch.long, device=model.device)

    def run_largest(self, num_tokens: int) -> None:
        """See `Follower.run_largest`; nothing is measured on a CPU."""

    def warm_up(self) -> None:
        """See `Follower.warm_up`: there is nothing to prepare."""

    @torch.inference_mode()
    def follow(self, step: RankStep) -> None:
        """See `Follower.follow`."""
        model, arrays = self._model, step.arrays
        self._page_tables.reshape(-1)[step.page_indices] = step.pages
        num_columns = arrays.most_pages(self._kv_cache.page_size)
        page_tables = torch.from_numpy(self._page_tables[:, arrays.part_rows, :num_columns]).to(model.device)
        token_ids, batch = pack_batch(arrays, page_tables, self._kv_cache.page_size, self._last_token_ids)
        context = PagedContext(self._backend, self._kv_cache, batch, self._states)
        kept = torch.from_numpy(arrays.kept_tokens).to(model.device)
        self._states.restore(arrays.restored)
        adapters = token_adapters(self.adapters, arrays)
        hidden = model.hidden_states(token_ids, batch.positions, context, kept, adapters)
        self._states.save(arrays.saved)
        lens = len(arrays.draw_rows), len(arrays.pooled_tokens), len(arrays.scored_tokens)
        drawn, _, scored = hidden.split_with_sizes(lens)
        for part in scored.split_with_sizes(_num_scored(arrays)):
            for these in batches(len(part), MAX_SCORED_AT_ONCE):
                model.logits(part[these])
        if len(drawn):
            model.logits(drawn)


def _num_scored(arrays: StepArrays) -> list[int]:
    """Number of scored tokens in each part that has any."""
    parts = np.searchsorted(arrays.query_starts, arrays.scored_tokens, side="right")
    return [int(count) for count in np.bincount(parts) if count]
