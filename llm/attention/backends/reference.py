"""The oracle: attention as its definition reads, one sequence at a time, in float32."""

import torch

from llm.attention.dense import causal_mask
from llm.attention.paged import PackedBatch


class ReferenceBackend:
    """Plain softmax(QKᵀ / sqrt(d)) V over gathered pages. Every other backend is tested against it."""

    name = "reference"

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_pages: torch.Tensor,
        batch: PackedBatch,
        group: int,
        window: int | None,
    ) -> torch.Tensor:
        """See `PagedAttentionBackend.attend`."""
        del key, value  # read back from the pages, so that storing them is tested too
        outputs = []
        start = 0
        for i, (num_new, context_len) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
            pages = batch.page_tables[group, i, : -(-context_len // batch.page_size)]
            keys, values = kv_pages[:, pages].flatten(1, 2)[:, :context_len].float()
            outputs.append(_attend_one(query[start : start + num_new].float(), keys, values, window))
            start += num_new
        return torch.cat(outputs).to(query.dtype)


def _attend_one(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None) -> torch.Tensor:
    """One sequence: query (new, heads, dim) against keys and values (context, kv_heads, dim)."""
    group_size = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group_size, dim=1), values.repeat_interleave(group_size, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, keys) * query.shape[-1] ** -0.5
    mask = causal_mask(query.shape[0], keys.shape[0], window, query.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
