"""Paged attention by PyTorch's `scaled_dot_product_attention`: the CPU's backend, portable to any device."""

from itertools import pairwise

import torch
import torch.nn.functional as F

from llm.attention.dense import causal_mask
from llm.attention.paged import PackedBatch

_BUCKET_RATIO = 1.5
"""Decoding rows share one padded product while the longest context is at most this much longer than the shortest."""


class SdpaBackend:
    """Gathers pages into padded batches for decodes and runs prefill chunks one by one."""

    name = "sdpa"

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_pages: torch.Tensor,
        batch: PackedBatch,
        window: int | None,
    ) -> torch.Tensor:
        """See `PagedAttentionBackend.attend`."""
        output = torch.empty_like(query)
        for rows in _decode_buckets(batch.context_lens[: batch.num_decodes]):
            output[rows] = _decode(query[rows], kv_pages, batch, rows, window)
        start = batch.num_decodes
        for i in range(batch.num_decodes, len(batch.query_lens)):
            part = slice(start, start + batch.query_lens[i])
            if batch.context_lens[i] == batch.query_lens[i]:
                keys, values = key[part], value[part]
            else:
                pages = batch.page_tables[i, : -(-batch.context_lens[i] // batch.page_size)]
                keys, values = kv_pages[:, pages].flatten(1, 2)[:, : batch.context_lens[i]]
            output[part] = _prefill(query[part], keys, values, window)
            start = part.stop
        return output


def _decode_buckets(context_lens: tuple[int, ...]) -> list[list[int]]:
    """Rows in groups of similar context length, so that padding stays small."""
    order = sorted(range(len(context_lens)), key=context_lens.__getitem__)
    borders = [0] if order else []
    for i, row in enumerate(order):
        if context_lens[row] > _BUCKET_RATIO * context_lens[order[borders[-1]]] + 64:
            borders.append(i)
    return [order[start:end] for start, end in pairwise([*borders, len(order)])]


def _decode(
    query: torch.Tensor, kv_pages: torch.Tensor, batch: PackedBatch, rows: list[int], window: int | None
) -> torch.Tensor:
    """One new token a row: query (rows, num_heads, head_dim). A group of query heads stands in the sequence's place."""
    page_size, num_kv_heads = batch.page_size, kv_pages.shape[3]
    ends = [batch.context_lens[row] for row in rows]
    starts = [0 if window is None else max(end - window, 0) for end in ends]
    first_pages = [start // page_size for start in starts]
    num_pages = max(-(-end // page_size) - first for end, first in zip(ends, first_pages, strict=True))
    tables = batch.page_tables[rows]
    if any(first_pages):
        columns = torch.tensor(first_pages, device=query.device).unsqueeze(1) + torch.arange(num_pages, device=query.device)
        tables = tables.gather(1, columns.clamp_max(tables.shape[1] - 1))
    keys, values = kv_pages[:, tables[:, :num_pages]].flatten(2, 3)
    bounds = torch.tensor([starts, ends], device=query.device) - page_size * torch.tensor(first_pages, device=query.device)
    offsets = torch.arange(keys.shape[1], device=query.device)
    mask = (offsets >= bounds[0].unsqueeze(1)) & (offsets < bounds[1].unsqueeze(1))
    output = F.scaled_dot_product_attention(
        query.unflatten(1, (num_kv_heads, -1)), keys.transpose(1, 2), values.transpose(1, 2), mask[:, None, None]
    )
    return output.flatten(1, 2)


def _prefill(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None) -> torch.Tensor:
    """One sequence: query (new, num_heads, head_dim) against keys and values (context, num_kv_heads, head_dim)."""
    is_plain_causal = query.shape[0] == keys.shape[0] and (window is None or keys.shape[0] <= window)
    mask = None if is_plain_causal else causal_mask(query.shape[0], keys.shape[0], window, query.device)
    output = F.scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        keys.transpose(0, 1).unsqueeze(0),
        values.transpose(0, 1).unsqueeze(0),
        mask,
        is_causal=is_plain_causal,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return output.squeeze(0).transpose(0, 1)
