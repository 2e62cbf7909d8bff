"""Runs a planned step: packs it into tensors, calls the model, draws the tokens."""

from collections.abc import Sequence as SequenceOf

import torch

from llm.attention.paged import PackedBatch, PagedAttentionBackend, PagedContext
from llm.core.paged_kv_cache import PagedKVCache
from llm.core.sampling import Draw, SamplingRow, sample
from llm.models.decoder import DecoderModel
from llm.serving.scheduler import ScheduledSequence, StepPlan


class ModelRunner:
    """Owns the model, the pool's memory and everything else on the device.

    Args:
        model: in evaluation mode, on its device.
        kv_cache: memory of the slot pool, on the same device.
        backend: paged attention.
    """

    def __init__(self, model: DecoderModel, kv_cache: PagedKVCache, backend: PagedAttentionBackend) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.backend = backend
        self._windows = [model.config.layer_window(layer) for layer in range(model.num_layers)]

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> list[Draw]:
        """Run one step; return a draw for each part of the plan that `draws`, in order."""
        token_ids, batch = self._pack(plan.scheduled)
        context = PagedContext(self.backend, self.kv_cache, batch, self._windows)
        hidden = self.model.hidden_states(token_ids, batch.positions, context)
        ends = torch.tensor(batch.query_lens).cumsum(0) - 1
        drawing = [i for i, part in enumerate(plan.scheduled) if part.draws]
        if not drawing:
            return []
        logits = self.model.logits(hidden[ends[drawing].to(hidden.device)])
        return sample(logits, [_sampling_row(plan.scheduled[i]) for i in drawing])

    def _pack(self, scheduled: SequenceOf[ScheduledSequence]) -> tuple[torch.Tensor, PackedBatch]:
        """Token ids (tokens,) of the step and where they belong."""
        page_size = self.kv_cache.page_size
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for part in scheduled:
            span = range(part.start, part.end)
            pages = part.sequence.pages
            token_ids += part.sequence.tokens[part.start : part.end]
            positions += span
            slots += [pages[i // page_size] * page_size + i % page_size for i in span]
        num_columns = max(-(-part.end // page_size) for part in scheduled)
        tables = [part.sequence.pages[:num_columns] for part in scheduled]
        tables = [pages + [self.kv_cache.scratch_page] * (num_columns - len(pages)) for pages in tables]
        device = self.model.device
        batch = PackedBatch(
            query_lens=tuple(part.num_tokens for part in scheduled),
            context_lens=tuple(part.end for part in scheduled),
            page_tables=torch.tensor(tables, device=device),
            slots=torch.tensor(slots, device=device),
            positions=torch.tensor(positions, device=device),
            page_size=page_size,
        )
        return torch.tensor(token_ids, device=device), batch


def _sampling_row(part: ScheduledSequence) -> SamplingRow:
    """What the sampler needs to know of one drawing sequence."""
    sequence, request = part.sequence, part.sequence.request
    return SamplingRow(
        seed=request.seed,
        position=part.end,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=request.logit_bias,
        prompt_ids=sequence.prompt_ids if request.repetition_penalty != 1 else (),
        output_ids=sequence.output_ids if request.uses_penalties else (),
        banned_ids=() if sequence.may_end else tuple(sequence.end_ids),
        num_logprobs=request.logprobs,
    )
