"""Paged attention by PyTorch's `scaled_dot_product_attention`: the CPU's backend, portable to any device."""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from llm.attention.dense import attend_by_definition, causal_attention, causal_mask
from llm.attention.paged import PackedBatch
from llm.attention.spec import AttentionSpec

_BUCKET_RATIO, _BUCKET_SLACK = 1.5, 64
"""Decoding rows share one padded product while the longest context is at most ratio * shortest + slack tokens."""


class SdpaBackend:
    """Gathers pages into padded batches for decodes and runs prefill chunks one by one."""

    name = "sdpa"

    def __init__(self) -> None:
        # Gathering into memory that is there already is five times as fast on a CPU as into fresh pages of the
        # operating system.
        self._scratch: torch.Tensor | None = None
        self._planned_batch: PackedBatch | None = None
        self._decode_plans: dict[int, list[_DecodeBucket]] = {}

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
        output = query.new_empty(*query.shape[:2], spec.value_size)
        for bucket in self._decode_plan(batch, group, spec.window):
            if bucket.rows is None:
                output[: batch.num_decodes] = self._decode(query[: batch.num_decodes], kv_pages, bucket, spec, sinks)
            else:
                output[bucket.rows] = self._decode(query[bucket.rows], kv_pages, bucket, spec, sinks)
        start = batch.num_decodes
        for i in range(batch.num_decodes, len(batch.query_lens)):
            part = slice(start, start + batch.query_lens[i])
            if batch.context_lens[i] == batch.query_lens[i]:
                keys, values = key[part], value[part]
            else:
                pages = batch.page_tables[group, i, : -(-batch.context_lens[i] // batch.page_size)]
                gathered = self._gather(kv_pages, pages).flatten(1, 2)[:, : batch.context_lens[i]]
                keys, values = gathered[0], gathered[-1][..., : spec.value_size]
            output[part] = _prefill(query[part], keys, values, spec, sinks)
            start = part.stop
        return output

    def _decode_plan(self, batch: PackedBatch, group: int, window: int | None) -> list["_DecodeBucket"]:
        """Buckets of the batch's decoding rows, made once a step and group, not once a layer."""
        if self._planned_batch is not batch:
            self._planned_batch = batch
            self._decode_plans = {}
        if group not in self._decode_plans:
            buckets = _bucket_rows(batch.context_lens[: batch.num_decodes])
            self._decode_plans[group] = [_make_bucket(batch, rows, group, window) for rows in buckets]
        return self._decode_plans[group]

    def _decode(
        self,
        query: torch.Tensor,
        kv_pages: torch.Tensor,
        bucket: "_DecodeBucket",
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """One new token a row: query (rows, num_heads, head_dim). A group of heads stands in the sequence's place."""
        num_rows, num_kv_heads, head_dim = query.shape[0], *kv_pages.shape[3:]
        gathered = self._gather(kv_pages, bucket.page_tables.flatten())
        stored = gathered.view(len(gathered), num_rows, -1, num_kv_heads, head_dim)[:, :, : bucket.num_slots]
        keys, values = stored[0].transpose(1, 2), stored[-1][..., : spec.value_size].transpose(1, 2)
        grouped_query = query.view(num_rows, num_kv_heads, -1, head_dim)
        if spec.is_plain:
            output = F.scaled_dot_product_attention(grouped_query, keys, values, bucket.mask, scale=spec.scale)
        else:
            grouped_sinks = None if sinks is None else sinks.view(num_kv_heads, -1, 1)
            output = attend_by_definition(grouped_query, keys, values, bucket.mask, spec, grouped_sinks)
        return output.flatten(1, 2)

    def _gather(self, kv_pages: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """Copies of `pages` (n,): (2, n, page_size, num_kv_heads, head_dim) or (1, …), good until the next call."""
        shape = (len(kv_pages), len(pages), *kv_pages.shape[2:])
        num_elements = math.prod(shape)
        if self._scratch is None or self._scratch.numel() < num_elements or self._scratch.dtype != kv_pages.dtype:
            self._scratch = torch.empty(num_elements * 5 // 4, dtype=kv_pages.dtype, device=kv_pages.device)
        gathered = self._scratch[:num_elements].view(shape)
        for source, target in zip(kv_pages, gathered, strict=True):
            torch.index_select(source, 0, pages, out=target)
        return gathered


@dataclass(frozen=True, slots=True)
class _DecodeBucket:
    """Decoding rows of similar context that share one padded product.

    Attributes:
        rows: indices into the batch; None for all decoding rows in order.
        page_tables: (rows, pages) int64, the pages that hold what each row attends to.
        num_slots: slots of those pages that the longest row needs.
        mask: (rows, 1, 1, num_slots) boolean, True where attended to, None where all are.
    """

    rows: torch.Tensor | None
    page_tables: torch.Tensor
    num_slots: int
    mask: torch.Tensor | None


def _bucket_rows(context_lens: tuple[int, ...]) -> list[list[int]]:
    """Rows in groups of similar context length, so that padding stays small."""
    order = sorted(range(len(context_lens)), key=context_lens.__getitem__)
    borders = [0] if order else []
    for i, row in enumerate(order):
        if context_lens[row] > _BUCKET_RATIO * context_lens[order[borders[-1]]] + _BUCKET_SLACK:
            borders.append(i)
    if len(borders) == 1:
        return [list(range(len(context_lens)))]
    return [order[start:end] for start, end in pairwise([*borders, len(order)])]


def _make_bucket(batch: PackedBatch, rows: list[int], group: int, window: int | None) -> _DecodeBucket:
    page_size, device = batch.page_size, batch.page_tables.device
    ends = [batch.context_lens[row] for row in rows]
    starts = [0 if window is None else max(end - window, 0) for end in ends]
    first_pages = [start // page_size for start in starts]
    offset_ends = [end - first * page_size for end, first in zip(ends, first_pages, strict=True)]
    num_slots = max(offset_ends)
    num_pages = -(-num_slots // page_size)
    row_ids = None if rows == list(range(batch.num_decodes)) else torch.tensor(rows, device=device)
    tables = batch.page_tables[group]
    tables = tables[: batch.num_decodes] if row_ids is None else tables[row_ids]
    if any(first_pages):
        columns = torch.tensor(first_pages, device=device).unsqueeze(1) + torch.arange(num_pages, device=device)
        tables = tables.gather(1, columns.clamp_max(tables.shape[1] - 1))
    tables = tables[:, :num_pages]
    if all(end == num_slots for end in offset_ends) and not any(starts):
        return _DecodeBucket(row_ids, tables, num_slots, None)
    offset_starts = [start - first * page_size for start, first in zip(starts, first_pages, strict=True)]
    bounds = torch.tensor([offset_starts, offset_ends], device=device).unsqueeze(2)
    offsets = torch.arange(num_slots, device=device)
    mask = (offsets >= bounds[0]) & (offsets < bounds[1])
    return _DecodeBucket(row_ids, tables, num_slots, mask[:, None, None])


def _prefill(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec, sinks: torch.Tensor | None
) -> torch.Tensor:
    """One sequence: query (new, num_heads, head_dim) against keys and values (context, num_kv_heads, dim of either)."""
    is_plain_causal = query.shape[0] == keys.shape[0] and (spec.window is None or keys.shape[0] <= spec.window)
    mask = None if is_plain_causal else causal_mask(query.shape[0], keys.shape[0], spec.window, query.device)
    query, keys, values = (x.transpose(0, 1).unsqueeze(0) for x in (query, keys, values))
    output = causal_attention(query, keys, values, mask, spec, sinks, is_causal=is_plain_causal)
    return output.squeeze(0).transpose(0, 1)
