"""`EagerRunner`: runs steps op by op with PyTorch and draws their tokens; each has finished when its launch returns."""

from collections.abc import Mapping, Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from llm.attention.dense import DenseContext
from llm.models.adapters import AdapterMemory
from llm.sampling.constraint import Int32Array, words_of
from llm.sampling.draw import Draw, SamplingRow, likeliest, sample
from llm.scheduling.sequence import Sequence, StepPart
from llm.schemas import TokenLogprobs
from llm.serving.eager_model import EagerModel
from llm.serving.model_runner import (
    MAX_SCORED_AT_ONCE,
    DrawMasks,
    LaunchedStep,
    PlannedDraw,
    planned_draws,
    vector_bytes,
)
from llm.serving.step_arrays import StepArrays, batches
from llm.serving.step_packer import PackedPlan


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
    """The `ModelRunner` that calls PyTorch op by op.

    Args:
        eager: runs the model; used by this runner only.
        max_steps_ahead: brings no speed here; with it, tests check that an engine may run ahead.
    """

    def __init__(self, eager: EagerModel, *, max_steps_ahead: int = 0) -> None:
        self.eager = eager
        self.model = model = eager.model
        self.max_steps_ahead = max_steps_ahead
        self._last_token_ids = eager.last_token_ids
        self._pooled = torch.zeros(eager.max_rows, model.hidden_size, dtype=torch.float32, device=model.device)
        """By row: the sum of the hidden states that make its sequence's vector."""
        self._masks = DrawMasks(model.config.vocab_size)
        self._mask_thread = ThreadPoolExecutor(1, thread_name_prefix="masks")

    @property
    def adapters(self) -> AdapterMemory | None:
        """See `ModelRunner.adapters`."""
        return self.eager.adapters

    @property
    def attention_backend(self) -> str:
        """See `ModelRunner.attention_backend`."""
        return self.eager.backend.name

    @property
    def max_draws_per_step(self) -> int | None:
        """See `ModelRunner.max_draws_per_step`."""
        return None

    @torch.inference_mode()
    def run_largest(self, num_tokens: int) -> None:
        """See `ModelRunner.run_largest`."""
        zeros = torch.zeros(1, num_tokens, dtype=torch.long, device=self.model.device)  # as token ids and as positions
        hidden = self.model.hidden_states(zeros, zeros, DenseContext())
        self.model.logits(hidden[0, : self.eager.max_rows]).float().sort(dim=-1)

    def warm_up(self) -> None:
        """See `ModelRunner.warm_up`; here there is nothing to prepare."""

    @torch.inference_mode()
    def launch(self, plan: PackedPlan) -> LaunchedStep:
        """See `ModelRunner.launch`."""
        parts, arrays = plan.parts, plan.arrays
        planned = planned_draws(parts)
        masks = self._start_masks(planned)
        drawn, pooled, scored = self.eager.run(arrays, self._page_tables(parts, arrays))
        vectors = self._pool(parts, pooled)
        scores = self._score(parts, scored)
        if not planned:
            return _FinishedStep([], vectors, scores)
        logits = self.model.logits(drawn)
        allowed = masks.result() if masks is not None else {}
        draws = sample(logits, [self._sampling_row(part, position, allowed) for part, position in planned])
        if self.max_steps_ahead:  # otherwise the host knows every token it launches
            # Of several draws of a row any may remain: the host knows them before the row's next step.
            token_ids = torch.tensor([max(draw.token_id, 0) for draw in draws], device=drawn.device)
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

    def _start_masks(self, planned: SequenceOf[PlannedDraw]) -> "Future[dict[int, Int32Array]] | None":
        """Begin to compute, during the forward pass, which tokens a grammar allows in draws: bits by row."""
        bound = [draw for draw in planned if draw.part.sequence.constraint is not None]
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
        kv_cache = self.eager.kv_cache
        num_columns = arrays.most_pages(kv_cache.page_size)
        padding = [kv_cache.scratch_page] * num_columns
        return torch.tensor(
            [
                [(part.sequence.pages[group] + padding)[:num_columns] for part in parts]
                for group in range(kv_cache.num_groups)
            ],
            device=self.model.device,
        )


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> list[TokenLogprobs]:
    """Log probabilities of one token for each row of logits (rows, vocab_size), and of the row's likeliest tokens."""
    logits = logits.float()
    logprobs = logits.log_softmax(-1)
    top_ids = likeliest(logits, num_top)
    own, top = logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1), logprobs.gather(1, top_ids)
    rows = zip(token_ids.tolist(), own.tolist(), top_ids.tolist(), top.tolist(), strict=True)
    return [TokenLogprobs(token_id, value, tuple(zip(*likely, strict=True))) for token_id, value, *likely in rows]
