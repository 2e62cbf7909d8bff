"""Runs a planned step: packs it into tensors, calls the model and draws the tokens."""

from collections.abc import Callable, Mapping, Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from llm.attention.dense import DenseContext
from llm.attention.paged import PackedBatch, PagedAttentionBackend, PagedContext
from llm.core.paged_kv_cache import PagedKVCache
from llm.core.recurrent_state import RecurrentStates
from llm.models.adapters import AdapterMemory, TokenAdapters
from llm.models.decoder import DecoderModel
from llm.sampling.constraint import Int32Array, TokenMasks, words_of
from llm.sampling.draw import Draw, SamplingRow, likeliest, sample
from llm.scheduling.sequence import Sequence, StepPart, StepPlan
from llm.serving.schemas import TokenLogprobs
from llm.serving.step_arrays import UNSEEN, StepArrays, batches

MAX_SCORED_AT_ONCE = 256
"""Most prompt tokens whose logits there is memory for at once."""
Drawing = tuple[StepPart, int]
"""A draw of a step: its part, and the position of the token to draw."""


class LaunchedStep(Protocol):
    """A step that the device is running or has run."""

    def draws(self) -> list[Draw]:
        """Wait for the step; return the draws of the plan's parts in order, `num_draws` for each.

        Called at most once. Raises any error that occurred in the step.
        """
        ...

    def vectors(self) -> Mapping[int, bytes]:
        """The vectors that the step has completed, as in `StepOutput.vector`, by the rows of their parts.

        Called after `draws`.
        """
        ...

    def scores(self) -> SequenceOf[tuple[Sequence, list[TokenLogprobs]]]:
        """How likely the next tokens of prompts were: `num_scored` entries for each part that has any, in order.

        Called after `draws`.
        """
        ...


class ModelRunner(Protocol):
    """Owns the model, the pool's memory and everything else on the device, and runs steps in order of launching."""

    @property
    def attention_backend(self) -> str:
        """Name of the attention backend in use, for display."""
        ...

    @property
    def max_steps_ahead(self) -> int:
        """Steps that may be launched before the draws of the oldest one are read; 0 for none."""
        ...

    @property
    def max_draws_per_step(self) -> int | None:
        """Draws that a step has room for, at least one per row; None for any number."""
        ...

    @property
    def adapters(self) -> AdapterMemory | None:
        """Slots for adapters that requests choose; None if they cannot."""
        ...

    def run_largest(self, num_tokens: int) -> None:
        """Run the largest possible step, with `num_tokens` tokens of several sequences, and capture it if steps are
        captured: no step takes more memory."""
        ...

    def warm_up(self) -> None:
        """Prepare whatever would make a first request wait. Called before anything has been launched."""
        ...

    def launch(self, plan: StepPlan, arrays: StepArrays | None = None) -> LaunchedStep:
        """Start a step, which has at least one part; `arrays` are the step's arrays, if the caller has made them.

        All of its data on the host (tokens, pages, requests) is read before this returns. A token that the host does
        not know yet (see `StepPart`) is the one drawn last at the part's row. If this raises, the step has no draws;
        steps launched before it are not affected.
        """
        ...


@dataclass(frozen=True, slots=True)
class _FinishedStep:
    """A step that ran during its launch."""

    results: list[Draw]
    completed: dict[int, bytes]
    scored: list[tuple[Sequence, list[TokenLogprobs]]]

    def draws(self) -> list[Draw]:
        """See `LaunchedStep.draws`."""
        return self.results

    def vectors(self) -> dict[int, bytes]:
        """See `LaunchedStep.vectors`."""
        return self.completed

    def scores(self) -> list[tuple[Sequence, list[TokenLogprobs]]]:
        """See `LaunchedStep.scores`."""
        return self.scored


class EagerRunner:
    """The `ModelRunner` that calls PyTorch op by op; a step has finished when its launch returns.

    Args:
        model: in evaluation mode, on its device.
        kv_cache: memory of the slot pool, on the same device.
        backend: paged attention.
        max_rows: rows that the scheduler hands out.
        num_snapshots: see `RecurrentStates`.
        max_steps_ahead: brings no speed here; with it, tests check that an engine may run ahead.
        adapters: see `ModelRunner.adapters`.
    """

    def __init__(
        self,
        model: DecoderModel,
        kv_cache: PagedKVCache,
        backend: PagedAttentionBackend,
        *,
        max_rows: int,
        num_snapshots: int = 0,
        max_steps_ahead: int = 0,
        adapters: AdapterMemory | None = None,
    ) -> None:
        self.model = model
        self.adapters = adapters
        self.kv_cache = kv_cache
        self.backend = backend
        self.max_steps_ahead = max_steps_ahead
        self._max_rows = max_rows
        self._states = RecurrentStates(model.delta_specs, max_rows, model.device, model.dtype, num_snapshots)
        self._last_token_ids = torch.zeros(max_rows, dtype=torch.long, device=model.device)
        self._pooled = torch.zeros(max_rows, model.hidden_size, dtype=torch.float32, device=model.device)
        """By row: the sum of the hidden states that make its sequence's vector."""
        self._masks = DrawMasks(model.config.vocab_size)
        self._mask_thread = ThreadPoolExecutor(1, thread_name_prefix="masks")

    @property
    def attention_backend(self) -> str:
        """See `ModelRunner.attention_backend`."""
        return self.backend.name

    @property
    def max_draws_per_step(self) -> int | None:
        """See `ModelRunner.max_draws_per_step`."""
        return None

    @torch.inference_mode()
    def run_largest(self, num_tokens: int) -> None:
        """See `ModelRunner.run_largest`."""
        positions = torch.arange(num_tokens, device=self.model.device) % self.model.max_seq_len
        context = DenseContext()
        hidden = self.model.hidden_states(torch.zeros_like(positions).unsqueeze(0), positions, context)
        self.model.logits(hidden[0, : self._max_rows]).float().sort(dim=-1)

    def warm_up(self) -> None:
        """See `ModelRunner.warm_up`; here there is nothing to prepare."""

    @torch.inference_mode()
    def launch(self, plan: StepPlan, arrays: StepArrays | None = None) -> LaunchedStep:
        """See `ModelRunner.launch`."""
        arrays = StepArrays.of(plan.parts) if arrays is None else arrays
        page_tables = self._page_tables(plan.parts, arrays)
        token_ids, batch = pack_batch(arrays, page_tables, self.kv_cache.page_size, self._last_token_ids)
        context = PagedContext(self.backend, self.kv_cache, batch, self._states)
        drawing = draws_of(plan.parts)
        masks = self._start_masks(drawing)
        kept = torch.from_numpy(arrays.kept_tokens).to(token_ids.device)
        self._states.restore(arrays.restored)
        adapters = token_adapters(self.adapters, arrays)
        hidden = self.model.hidden_states(token_ids, batch.positions, context, kept, adapters)
        self._states.save(arrays.saved)
        drawn, pooled, scored = hidden.split_with_sizes(
            [len(drawing), len(arrays.pooled_tokens), len(arrays.scored_tokens)]
        )
        vectors = self._pool(plan.parts, pooled)
        scores = self._score(plan.parts, scored)
        if not drawing:
            return _FinishedStep([], vectors, scores)
        logits = self.model.logits(drawn)
        allowed = masks.result() if masks is not None else {}
        draws = sample(logits, [self._sampling_row(part, position, allowed) for part, position in drawing])
        if self.max_steps_ahead:  # otherwise the host knows every token it launches
            # Of several draws of a row any may remain: the host knows them before the row's next step.
            token_ids = torch.tensor([max(draw.token_id, 0) for draw in draws], device=hidden.device)
            self._last_token_ids[arrays.draw_rows] = token_ids
        return _FinishedStep(draws, vectors, scores)

    def _pool(self, parts: SequenceOf[StepPart], hidden: torch.Tensor) -> dict[int, bytes]:
        """Add hidden states (pooled, hidden_size) to their vectors; returns the vectors that are complete."""
        pooled = [part for part in parts if part.num_pooled]
        for part, states in zip(pooled, hidden.split_with_sizes([p.num_pooled for p in pooled]), strict=True):
            state = states.float().sum(0)
            self._pooled[part.row] = state if part.begins_vector else self._pooled[part.row] + state
        rows = [part.row for part in parts if part.completes_vector]
        if not rows:
            return {}
        is_classifier = self.model.config.classifier is not None
        vectors = self.model.logits(self._pooled[rows]) if is_classifier else self._pooled[rows]
        return vector_bytes(vectors.cpu(), rows, normalizes=not is_classifier)

    def _score(self, parts: SequenceOf[StepPart], hidden: torch.Tensor) -> list[tuple[Sequence, list[TokenLogprobs]]]:
        """Log probabilities of the prompts' next tokens, from hidden states (scored, hidden_size), in batches."""
        scores = []
        scored = [part for part in parts if part.num_scored]
        for part, states in zip(scored, hidden.split_with_sizes([p.num_scored for p in scored]), strict=True):
            targets = torch.tensor(part.scored_ids, device=hidden.device)
            num_top = min(part.sequence.request.prompt_logprobs or 0, self.model.config.vocab_size)
            entries: list[TokenLogprobs] = []
            for these in batches(part.num_scored, MAX_SCORED_AT_ONCE):
                entries += token_logprobs(self.model.logits(states[these]), targets[these], num_top)
            scores.append((part.sequence, entries))
        return scores

    def _start_masks(self, drawing: SequenceOf[Drawing]) -> "Future[dict[int, Int32Array]] | None":
        """Begin to compute, during the forward pass, which tokens a grammar allows in draws: bits by row."""
        bound = [draw for draw in drawing if draw[0].sequence.constraint is not None]
        if not bound:
            return None
        masks = np.empty((len(bound), self._masks.num_words), dtype=np.int32)

        def write() -> dict[int, Int32Array]:
            self._masks.write_draws(bound, lambda row: int(self._last_token_ids[row]), masks)
            return {part.row: words for (part, _), words in zip(bound, masks, strict=True)}

        return self._mask_thread.submit(write)

    def _sampling_row(self, part: StepPart, position: int, allowed: Mapping[int, Int32Array]) -> SamplingRow:
        """What the sampler needs to know to draw a part's token at `position`."""
        sequence, request = part.sequence, part.sequence.request
        output_ids = sequence.output_ids if sequence.uses_penalties else []
        if sequence.uses_penalties and position > len(sequence.tokens):
            output_ids.append(int(self._last_token_ids[part.row]))  # drawn, but not seen by the host
        bits = allowed.get(part.row)
        if request.allowed_token_ids is not None:
            bits = words_of(request.allowed_token_ids, self.model.config.vocab_size)
        return SamplingRow(
            seed=request.seed,
            position=position,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            repetition_penalty=request.repetition_penalty,
            logit_bias=request.logit_bias,
            prompt_ids=sequence.prompt_ids if request.repetition_penalty != 1 else (),
            output_ids=output_ids,
            banned_ids=() if sequence.may_end_at(position) else tuple(sequence.end_ids),
            allowed=bits,
            num_logprobs=request.num_draw_logprobs,
            are_top_allowed=request.scores_allowed,
        )

    def _page_tables(self, parts: SequenceOf[StepPart], arrays: StepArrays) -> torch.Tensor:
        """The pages of the step's parts, (groups, parts, pages), as many as the longest context needs."""
        num_columns = arrays.most_pages(self.kv_cache.page_size)
        padding = [self.kv_cache.scratch_page] * num_columns
        return torch.tensor(
            [
                [(part.sequence.pages[group] + padding)[:num_columns] for part in parts]
                for group in range(self.kv_cache.num_groups)
            ],
            device=self.model.device,
        )


def pack_batch(
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


def token_adapters(memory: AdapterMemory | None, arrays: StepArrays) -> TokenAdapters | None:
    """The adapters of a step's tokens; None if none has one."""
    if memory is None or not arrays.has_adapters:
        return None
    return TokenAdapters(memory, torch.from_numpy(arrays.token_adapters).to(memory.slots.device).long())


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> list[TokenLogprobs]:
    """Log probabilities of one token for each row of logits (rows, vocab_size), and of the row's likeliest tokens."""
    logits = logits.float()
    logprobs = logits.log_softmax(-1)
    top_ids = likeliest(logits, num_top)
    own, top = logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1), logprobs.gather(1, top_ids)
    rows = zip(token_ids.tolist(), own.tolist(), top_ids.tolist(), top.tolist(), strict=True)
    return [TokenLogprobs(token_id, value, tuple(zip(*likely, strict=True))) for token_id, value, *likely in rows]


def vector_bytes(found: torch.Tensor, rows: SequenceOf[int], *, normalizes: bool) -> dict[int, bytes]:
    """Convert sums of hidden states or logits of labels, (rows, size) float32 on the host, to `LaunchedStep.vectors`.

    Args:
        normalizes: make each vector's length 1.
    """
    vectors = found.numpy()
    if normalizes:
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors / np.maximum(norms, np.finfo(np.float32).tiny)
    return {row: vector.tobytes() for row, vector in zip(rows, vectors, strict=True)}


def draws_of(parts: SequenceOf[StepPart]) -> list[Drawing]:
    """A step's draws, in order."""
    return [(part, part.end + 1 - i) for part in parts for i in range(part.num_draws, 0, -1)]


class DrawMasks(TokenMasks):
    """The tokens that draws constrained by a grammar may draw."""

    def write_draws(self, drawing: SequenceOf[Drawing], last_token_id: Callable[[int], int], masks: Int32Array) -> None:
        """Write a row of bits for each of these draws.

        Args:
            drawing: draws that a grammar constrains, as `draws_of` returns them.
            last_token_id: returns the token last drawn at a row; called if the host has not seen it yet.
            masks: (draws, num_words).
        """
        constraints = {}
        for index, (part, position) in enumerate(drawing):
            sequence = part.sequence
            assert sequence.constraint is not None, "a grammar binds it"
            sequence.constraint.advance(sequence.tokens, sequence.num_prompt_tokens)
            if sequence.num_prompt_tokens + sequence.constraint.num_taken < position:
                sequence.constraint.take(last_token_id(part.row))
            constraints[index] = sequence.constraint
        self.write(constraints, masks)
