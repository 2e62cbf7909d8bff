"""The oracle: attention as its definition reads, one sequence at a time, in float32."""

import torch

from llm.attention.dense import attend_by_definition, causal_mask
from llm.attention.paged import PackedBatch
from llm.attention.spec import AttentionSpec


class ReferenceBackend:
    """Plain softmax(QKᵀ) V over gathered pages. Every other backend is tested against it."""

    name = "reference"

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_pages: torch.Tensor,
        batch: PackedBatch,
        group: int,
        spec: AttentionSpec,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `PagedAttentionBackend.attend`."""
        del key, value  # read back from the pages, so that storing them is tested too
        outputs = []
        start = 0
        for i, (num_new, context_len) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
            pages = batch.page_tables[group, i, : -(-context_len // batch.page_size)]
            stored = kv_pages[:, pages].flatten(1, 2)[:, :context_len].float()
            keys, values = stored[0], stored[-1][..., : spec.value_size]
            outputs.append(_attend_one(query[start : start + num_new].float(), keys, values, spec, sinks))
            start += num_new
        return torch.cat(outputs).to(query.dtype)


def _attend_one(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec, sinks: torch.Tensor | None
) -> torch.Tensor:
    """One sequence: query (new, heads, dim) against keys and values (context, kv_heads, dim of either)."""
    group_size = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group_size, dim=1).transpose(0, 1) for x in (keys, values))
    mask = causal_mask(query.shape[0], keys.shape[1], spec.window, query.device)
    sinks = None if sinks is None else sinks.view(-1, 1, 1)
    return attend_by_definition(query.transpose(0, 1), keys, values, mask, spec, sinks).transpose(0, 1)
