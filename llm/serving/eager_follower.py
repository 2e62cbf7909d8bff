"""`EagerFollower`: what ranks 1 and up do in a step that PyTorch runs op by op."""

import numpy as np
import torch

from llm.models.adapters import AdapterMemory
from llm.serving.eager_model import EagerModel
from llm.serving.model_runner import MAX_SCORED_AT_ONCE
from llm.serving.step_arrays import StepArrays, batches


class EagerFollower:
    """The counterpart of an `EagerRunner` on another rank.

    Args:
        eager: runs the model; used by this follower only.
        table_len: pages of the longest sequence.
    """

    def __init__(self, eager: EagerModel, table_len: int) -> None:
        self._eager = eager
        shape = eager.kv_cache.num_groups, eager.max_rows + 1, table_len
        self._page_tables = np.full(shape, eager.kv_cache.scratch_page, np.int64)

    @property
    def adapters(self) -> AdapterMemory | None:
        """See `Follower.adapters`."""
        return self._eager.adapters

    def warm_up(self) -> None:
        """See `Follower.warm_up`: there is nothing to prepare."""

    @torch.inference_mode()
    def follow(self, arrays: StepArrays) -> None:
        """See `Follower.follow`."""
        model = self._eager.model
        self._page_tables.reshape(-1)[arrays.page_places] = arrays.pages
        num_columns = arrays.most_pages(self._eager.kv_cache.page_size)
        page_tables = torch.from_numpy(self._page_tables[:, arrays.part_rows, :num_columns]).to(model.device)
        drawn, _, scored = self._eager.run(arrays, page_tables)
        for part in scored.split_with_sizes(_num_scored(arrays)):
            for these in batches(len(part), MAX_SCORED_AT_ONCE):
                model.logits(part[these])
        if len(drawn):
            model.logits(drawn)


def _num_scored(arrays: StepArrays) -> list[int]:
    """Number of scored tokens in each part that has any."""
    parts = np.searchsorted(arrays.query_starts, arrays.scored_tokens, side="right")
    return [int(count) for count in np.bincount(parts) if count]
