"""`EagerModel`: runs the model's part of steps op by op with PyTorch."""

import torch

from llm.attention.paged import PackedBatch, PagedAttentionBackend, PagedContext
from llm.core.paged_kv_cache import PagedKVCache
from llm.core.recurrent_state import RecurrentStates
from llm.models.adapters import AdapterMemory, TokenAdapters
from llm.models.decoder import DecoderModel
from llm.serving.step_arrays import UNSEEN, StepArrays


class EagerModel:
    """Runs the model on a step's arrays, up to the hidden states of the tokens that are kept.

    The counterpart of `GraphModel`.

    Args:
        model: in evaluation mode, on its device.
        kv_cache: memory of the slot pool, on the same device.
        backend: paged attention.
        max_rows: rows that the scheduler hands out.
        num_snapshots: see `RecurrentStates`.
        adapters: slots for adapters that requests choose; None if they cannot.

    Attributes:
        last_token_ids: (max_rows,) int64, the last token drawn at each row; the runner writes it.
    """

    def __init__(
        self,
        model: DecoderModel,
        kv_cache: PagedKVCache,
        backend: PagedAttentionBackend,
        *,
        max_rows: int,
        num_snapshots: int = 0,
        adapters: AdapterMemory | None = None,
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.backend = backend
        self.max_rows = max_rows
        self.adapters = adapters
        self.last_token_ids = torch.zeros(max_rows, dtype=torch.long, device=model.device)
        self._states = RecurrentStates(model.delta_specs, max_rows, model.device, model.dtype, num_snapshots)

    def run(self, arrays: StepArrays, page_tables: torch.Tensor) -> list[torch.Tensor]:
        """Run the model on a step.

        Args:
            page_tables: (groups, parts, pages) int64, of the step's parts.

        Returns:
            Hidden states (tokens, hidden_size) of the tokens that draw, of those that are pooled, and of those that are
            scored.
        """
        token_ids, batch = _pack_batch(arrays, page_tables, self.kv_cache.page_size, self.last_token_ids)
        context = PagedContext(self.backend, self.kv_cache, batch, self._states)
        kept = torch.from_numpy(arrays.kept_tokens).to(token_ids.device)
        self._states.restore(arrays.restored)
        adapters = _token_adapters(self.adapters, arrays)
        hidden = self.model.hidden_states(token_ids, batch.positions, context, kept, adapters)
        self._states.save(arrays.saved)
        lens = len(arrays.draw_tokens), len(arrays.pooled_tokens), len(arrays.scored_tokens)
        return list(hidden.split_with_sizes(lens))


def _pack_batch(
    arrays: StepArrays, page_tables: torch.Tensor, page_size: int, last_token_ids: torch.Tensor
) -> tuple[torch.Tensor, PackedBatch]:
    """Token ids (tokens,) of a step and where they belong.

    Args:
        page_tables: (groups, parts, pages), of the step's parts.
        last_token_ids: (rows,), the last token drawn at each row.
    """
    device = page_tables.device
    positions, token_rows = (torch.from_numpy(a).to(device) for a in (arrays.positions, arrays.token_rows))
    part_of = torch.arange(len(arrays.part_rows), device=device)
    part_of = part_of.repeat_interleave(torch.from_numpy(arrays.query_lens).to(device))
    positions = positions.long()
    batch = PackedBatch(
        query_lens=tuple(arrays.query_lens.tolist()),
        context_lens=tuple(arrays.context_lens.tolist()),
        page_tables=page_tables,
        slots=page_tables[:, part_of, positions // page_size] * page_size + positions % page_size,
        positions=positions,
        page_size=page_size,
        rows=torch.from_numpy(arrays.part_rows).to(device).long(),
    )
    token_ids = torch.from_numpy(arrays.token_ids).to(device).long()
    return torch.where(token_ids == UNSEEN, last_token_ids[token_rows.long()], token_ids), batch


def _token_adapters(memory: AdapterMemory | None, arrays: StepArrays) -> TokenAdapters | None:
    """The adapters of a step's tokens; None if none has one."""
    if memory is None or not arrays.has_adapters:
        return None
    return TokenAdapters(memory, torch.from_numpy(arrays.token_adapters).to(memory.slots.device).long())
