"""`GraphRunner`: runs steps as CUDA graphs, each launched before the previous step's tokens are read."""

from collections.abc import Callable, Sequence as SequenceOf
from functools import partial

import numpy as np
import torch

from llm.kernels.sampling import DrawnTokens, SamplingWorkspace, draw_tokens
from llm.models.adapters import AdapterMemory
from llm.sampling.constraint import Int32Array
from llm.sampling.draw import Draw
from llm.sampling.row_state import RowState
from llm.serving.device_rows import row_start
from llm.serving.graph_model import NUM_BUFFERS, STEPS_AHEAD, GraphModel
from llm.serving.model_runner import MAX_SCORED_AT_ONCE, DrawMasks, PlannedDraw, planned_draws
from llm.serving.prompt_scores import PromptScores, Scores
from llm.serving.step_packer import PackedPlan
from llm.serving.vector_rows import VectorRows


class LaunchedGraphs:
    """A step in progress on the device.

    Args:
        drawn: host memory to which the device copies its draws.
        draw_rows: the row of each draw.
        wanted: draws whose log probabilities were requested, and the number of likeliest tokens for each.
        done: waits until the copies have arrived; raises any error that prevents them.
        completed: returns the vectors.
        scores: returns the log probabilities of prompts.
    """

    def __init__(
        self,
        drawn: DrawnTokens,
        draw_rows: Int32Array,
        wanted: SequenceOf[tuple[int, int]],
        done: Callable[[], None],
        completed: Callable[[], dict[int, bytes]],
        scores: Callable[[], Scores],
    ) -> None:
        self._drawn = drawn
        self._draw_rows = draw_rows
        self._wanted = wanted
        self._done = done
        self._completed = completed
        self._scores = scores
        self._draws: list[Draw] | None = None

    def draws(self) -> list[Draw]:
        """See `LaunchedStep.draws`; may be called more than once here."""
        if self._draws is None:
            self._done()
            self._draws = list(map(Draw, self._drawn.token_ids[: len(self._draw_rows)].tolist()))
            for index, num_top in self._wanted:
                logprob, top = self._drawn.logprobs_of(index, num_top)
                self._draws[index] = Draw(self._draws[index].token_id, logprob, top)
        return self._draws

    def vectors(self) -> dict[int, bytes]:
        """See `LaunchedStep.vectors`."""
        return self._completed()

    def scores(self) -> Scores:
        """See `LaunchedStep.scores`."""
        return self._scores()

    def last_token_id(self, row: int) -> int:
        """The (last) token that this step drew at `row`; 0 if nothing could be drawn."""
        index = int(np.flatnonzero(self._draw_rows == row)[-1])
        return max(self.draws()[index].token_id, 0)


class GraphRunner:
    """The `ModelRunner` for GPUs.

    A step is two graphs: the model's (see `GraphModel`), then logits and draws, captured for each padded number of
    draws.

    Args:
        graphs: runs the model; used by this runner only.
        wait: waits for an event of the device; None for `torch.cuda.Event.synchronize`.
    """

    attention_backend = "triton"
    max_steps_ahead = STEPS_AHEAD

    def __init__(self, graphs: GraphModel, *, wait: Callable[[torch.cuda.Event], None] | None = None) -> None:
        self.model = model = graphs.model
        self._graphs = graphs
        self._wait = wait or torch.cuda.Event.synchronize
        device = model.device
        num_rows = len(graphs.pages.last_token_ids)
        self._sampling = RowState(num_rows, model.config.vocab_size, device, graphs.uploads)
        self._vectors = VectorRows(num_rows, model, graphs.uploads, NUM_BUFFERS)
        most_draws = graphs.draw_sizes[-1]
        self._sampling_workspace = SamplingWorkspace.allocate(most_draws, model.config.vocab_size, device)
        self._prompt_scores = PromptScores(
            graphs.most_tokens, min(MAX_SCORED_AT_ONCE, most_draws), graphs.to_logits, self._sampling.tensors,
            self._sampling_workspace.logprobs, graphs.uploads, NUM_BUFFERS,
        )  # fmt: skip
        self._drawn = DrawnTokens.allocate(most_draws, device)
        pin = device.type == "cuda"
        self._host_drawn = [DrawnTokens.allocate(most_draws, "cpu", pin_memory=pin) for _ in range(NUM_BUFFERS)]
        self._num_steps = 0
        self._masks = DrawMasks(model.config.vocab_size)
        self._last: LaunchedGraphs | None = None

    @property
    def adapters(self) -> AdapterMemory | None:
        """See `ModelRunner.adapters`."""
        return self._graphs.adapters

    @property
    def max_draws_per_step(self) -> int:
        """See `ModelRunner.max_draws_per_step`."""
        return self._graphs.draw_sizes[-1]

    @torch.inference_mode()
    def launch(self, plan: PackedPlan) -> LaunchedGraphs:
        """See `ModelRunner.launch`."""
        parts, arrays, graphs = plan.parts, plan.arrays, self._graphs
        graphs.uploads.begin_step()
        self._sampling.start([row_start(part.row, part.sequence) for part in plan.starting])
        num_draws = len(arrays.draw_rows)
        graphs.launch(arrays)
        completed = self._vectors.add(parts, graphs.hidden[num_draws:])
        scores = self._prompt_scores.find(parts, graphs.hidden[num_draws + len(arrays.pooled_tokens) :])
        host = self._host_drawn[self._num_steps % NUM_BUFFERS]
        self._num_steps += 1
        wanted: list[tuple[int, int]] = []
        if num_draws:
            are_plain = arrays.draws_plainly
            if not are_plain:
                planned = planned_draws(parts)
                self._bind([draw for draw in planned if draw.part.sequence.constraint is not None])
                wanted = [
                    (index, min(num_top, self.model.config.vocab_size))
                    for index, (part, _) in enumerate(planned)
                    if (num_top := part.sequence.request.num_draw_logprobs) is not None
                ]
            size = graphs.draw_size(num_draws)
            graphs.run(("draws", size, are_plain), partial(self._run_draws, size, are_plain=are_plain))
            host.token_ids[:num_draws].copy_(self._drawn.token_ids[:num_draws], non_blocking=True)
            if wanted:
                host.logprobs[:num_draws].copy_(self._drawn.logprobs[:num_draws], non_blocking=True)
        self._last = launched = LaunchedGraphs(host, arrays.draw_rows, wanted, self._end(), completed, scores)
        return launched

    def _end(self) -> Callable[[], None]:
        """Return a function that waits for everything launched so far and raises any error that prevents it."""
        if not self._graphs.captures:
            return lambda: None
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return partial(self._wait, done)

    @torch.inference_mode()
    def run_largest(self, num_tokens: int) -> None:
        """See `ModelRunner.run_largest`."""
        self._graphs.run_largest(num_tokens)
        if self._graphs.draws_tokens:
            size = self._graphs.draw_sizes[-1]
            self._graphs.run(("draws", size, False), partial(self._run_draws, size, are_plain=False))

    @torch.inference_mode()
    def warm_up(self) -> None:
        """See `ModelRunner.warm_up`; all draws are captured."""
        if not self._graphs.captures:
            return
        self._graphs.warm_up()
        self._vectors.warm_up(self._graphs.hidden)
        for size, are_plain in self._graphs.warm_draws():
            self._graphs.run(("draws", size, are_plain), partial(self._run_draws, size, are_plain=are_plain))

    def _run_draws(self, num_draws: int, *, are_plain: bool) -> torch.Tensor:
        """Draw the tokens of all drawing parts; returns them.

        The draws of one row race for its `last_token_ids`. The value that remains is never read: if a part draws
        several tokens, the host knows them before it launches the row's next step.
        """
        graphs, exchange = self._graphs, self.model.exchange
        draw_tokens(
            graphs.to_logits(graphs.hidden[:num_draws]),
            graphs.inputs["draw_rows"][:num_draws],
            graphs.inputs["draw_positions"][:num_draws],
            self._sampling.tensors,
            self._sampling_workspace,
            self._drawn,
            graphs.pages.last_token_ids,
            are_plain=are_plain,
        )
        if exchange is not None:
            exchange.broadcast(graphs.pages.last_token_ids)
        return self._drawn.token_ids

    def _bind(self, draws: SequenceOf[PlannedDraw]) -> None:
        """Write the masks of the tokens allowed in draws that a grammar constrains.

        This waits for the last step's tokens while the device runs this step's model.
        """
        if not draws:
            return
        masks = self._graphs.uploads.tensor((len(draws), self._masks.num_words), torch.int32)
        self._masks.write_draws(draws, self._last_token_id, masks.numpy())
        self._sampling.bind([part.row for part, _ in draws], masks)

    def _last_token_id(self, row: int) -> int:
        """The token that the last step drew at `row`; only rows of that step have a token the host has not seen."""
        assert self._last is not None, "a first step's tokens are all known"
        return self._last.last_token_id(row)
