"""`GraphRunner`: steps as CUDA graphs, launched before the last step's tokens are read."""

import gc
import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from llm.core.paged_kv_cache import PagedKVCache
from llm.core.recurrent_state import RecurrentStates
from llm.kernels.sampling import DrawnTokens, SamplingWorkspace, draw_tokens
from llm.models.decoder import DecoderModel
from llm.models.kernel_operations import KernelOperations, KernelWorkspace, PackedStep
from llm.sampling.constraint import Int32Array
from llm.sampling.draw import Draw
from llm.scheduling.sequence import StepPlan
from llm.serving.device_rows import DeviceRows
from llm.serving.model_runner import MAX_SCORED_AT_ONCE, Drawing, DrawMasks, draws_of
from llm.serving.prompt_scores import PromptScores, Scores
from llm.serving.step_arrays import StepArrays
from llm.serving.step_inputs import StepInputs, fill
from llm.serving.vector_rows import VectorRows

logger = logging.getLogger(__name__)

_STEPS_AHEAD = 1
_WARM_PREFILLS = 64, 2048
"""Tokens of the steps with prefills that are captured at start, and the largest, which a burst of requests begins with;
the others are when they first come."""
_REPLAYED_TOKENS = 512
"""Graphs of so many tokens at most are replayed at start, too: the first replay uploads a graph (`cudaGraphUpload`),
which would hold up a step that takes a few milliseconds."""
_NUM_BUFFERS = _STEPS_AHEAD + 2
"""Of memory that the host fills and the device reads: one for each step in flight, one being filled."""


class LaunchedGraphs:
    """A step on its way through the device.

    Args:
        drawn: memory of the host's that the device copies its draws to.
        draw_rows: the row of each draw.
        wanted: draws whose log probabilities were asked for, and how many of the likeliest tokens'.
        done: happens when the copies are there; None where they are.
        completed: gives the vectors.
        scores: gives the log probabilities of prompts.
    """

    def __init__(
        self,
        drawn: DrawnTokens,
        draw_rows: Int32Array,
        wanted: SequenceOf[tuple[int, int]],
        done: torch.cuda.Event | None,
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
        """See `LaunchedStep.draws`; here as often as is wanted."""
        if self._draws is None:
            if self._done is not None:
                self._done.synchronize()
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
        """The token that this step drew (last) at `row`; 0 where nothing could be drawn."""
        index = int(np.flatnonzero(self._draw_rows == row)[-1])
        return max(self.draws()[index].token_id, 0)


class GraphRunner:
    """The `ModelRunner` for GPUs.

    A step is two graphs: the model up to the hidden states of the tokens that draw or are pooled, captured for each
    padded number of tokens and parts; then logits and draws, captured for each padded number of draws. The first step
    of a size runs kernel by kernel and is captured on the way. On a CPU (Triton's interpreter, in tests) every step
    runs kernel by kernel. Where more tokens are pooled than could draw, the model's graph is another one, which keeps
    every token's hidden state. Steps that copy contexts out of their pages have graphs of their own, too; where those
    contexts are long, they run kernel by kernel every time, for the launches hide behind them.

    Args:
        model: in evaluation mode, on its device.
        kv_cache: memory of the slot pool, on the same device.
        max_rows: rows that the scheduler gives out.
        max_tokens: token budget of a step.
        max_seq_len: longest sequence in tokens.
        max_draws_per_row: tokens that a row may draw in one step, 1 plus its guesses. A step has room for so many of
            every row; that of rows which draw less may be used by others.
        deterministic: see `KernelWorkspace`.
    """

    attention_backend = "triton"
    max_steps_ahead = _STEPS_AHEAD

    def __init__(
        self,
        model: DecoderModel,
        kv_cache: PagedKVCache,
        *,
        max_rows: int,
        max_tokens: int,
        max_seq_len: int,
        max_draws_per_row: int = 1,
        deterministic: bool = False,
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        device = self._device = model.device
        self._row_sizes = _padded_sizes(max_rows, 8)
        self._token_sizes = _padded_sizes(max_tokens, 4)
        self._draw_sizes = _padded_sizes(max_rows * max_draws_per_row, 8)
        self._max_draws_per_row = max_draws_per_row
        # Steps with prefills pad their parts, which cost little, generously: sizes of tokens times sizes of parts is
        # what may have to be captured.
        self._part_sizes = [*(size for size in (16, 64, 256) if size < self._row_sizes[-1]), self._row_sizes[-1]]
        max_pages = -(-max_seq_len // kv_cache.page_size)
        self._rows = DeviceRows(
            max_rows, max_pages, kv_cache.num_groups, kv_cache.scratch_page, model.config.vocab_size, device,
            _NUM_BUFFERS,
        )  # fmt: skip
        most_tokens, most_rows, most_draws = self._token_sizes[-1], self._row_sizes[-1], self._draw_sizes[-1]
        sizes = dict.fromkeys(("token_ids", "positions", "token_rows"), most_tokens)
        sizes |= dict.fromkeys(("part_rows", "query_starts", "query_lens", "context_lens"), most_rows)
        sizes |= dict.fromkeys(("draw_rows", "draw_positions"), most_draws)
        most_kept = sizes["kept_tokens"] = max(most_draws, most_tokens)
        self._inputs = StepInputs(sizes, device, _NUM_BUFFERS)
        self._workspace = KernelWorkspace(
            model.layer_specs, kv_cache, self._rows.page_tables, self._rows.last_token_ids, model.dtype,
            max_tokens=most_tokens, max_parts=most_rows, deterministic=deterministic, experts=model.experts,
            states=RecurrentStates(model.delta_specs, max_rows, device, model.dtype),
        )  # fmt: skip
        self._to_logits = partial(model.logits, head=self._workspace.head)
        """Hidden states (rows, hidden_size) → logits (rows, vocab_size), in the model's dtype."""
        self._hidden = torch.zeros(most_kept, model.hidden_size, dtype=model.dtype, device=device)
        """Of the tokens that are kept: those that draw, then those that are pooled."""
        self._vectors = VectorRows(max_rows + 1, model.hidden_size, device, self._rows.uploads, _NUM_BUFFERS)
        self._sampling_workspace = SamplingWorkspace.allocate(most_draws, model.config.vocab_size, device)
        self._prompt_scores = PromptScores(
            most_tokens, min(MAX_SCORED_AT_ONCE, most_draws), self._to_logits, self._rows.sampling.tensors,
            self._sampling_workspace.logprobs, self._rows.uploads, _NUM_BUFFERS,
        )  # fmt: skip
        self._drawn = DrawnTokens.allocate(most_draws, device)
        pin = device.type == "cuda"
        self._host_drawn = [DrawnTokens.allocate(most_draws, "cpu", pin_memory=pin) for _ in range(_NUM_BUFFERS)]
        self._num_steps = 0
        self._graphs: dict[tuple[object, ...], _Captured] = {}
        self._graph_pool = torch.cuda.graph_pool_handle() if pin else None
        self._masks = DrawMasks(model.config.vocab_size)
        self._last: LaunchedGraphs | None = None

    @property
    def max_draws_per_step(self) -> int:
        """See `ModelRunner.max_draws_per_step`."""
        return self._draw_sizes[-1]

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedGraphs:
        """See `ModelRunner.launch`."""
        parts = plan.parts
        self._rows.update(parts)
        arrays = StepArrays.of(parts)
        shape = self._send(arrays)
        num_gathered = self._workspace.num_gathered_tokens(arrays.query_lens, arrays.context_lens)
        num_draws = len(arrays.draw_rows)
        if num_gathered > self._workspace.fewest_gathered:
            self._run_model(*shape, num_gathered)
        else:
            self._run(("model", *shape, num_gathered), partial(self._run_model, *shape, num_gathered))
        completed = self._vectors.add(parts, self._hidden[num_draws:])
        scores = self._prompt_scores.find(parts, self._hidden[num_draws + len(arrays.pooled_tokens) :])
        host = self._host_drawn[self._num_steps % _NUM_BUFFERS]
        self._num_steps += 1
        wanted: list[tuple[int, int]] = []
        if num_draws:
            are_plain = all(part.sequence.draws_plainly for part in parts)
            if not are_plain:
                drawing = draws_of(parts)
                self._bind([draw for draw in drawing if draw[0].sequence.constraint is not None])
                wanted = [
                    (index, min(num_top, self.model.config.vocab_size))
                    for index, (part, _) in enumerate(drawing)
                    if (num_top := part.sequence.request.logprobs) is not None
                ]
            size = _padded(self._draw_sizes, num_draws)
            self._run(("draws", size, are_plain), partial(self._run_draws, size, are_plain=are_plain))
            host.token_ids[:num_draws].copy_(self._drawn.token_ids[:num_draws], non_blocking=True)
            if wanted:
                host.logprobs[:num_draws].copy_(self._drawn.logprobs[:num_draws], non_blocking=True)
        done = None
        if self._graph_pool is not None:
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        self._last = launched = LaunchedGraphs(host, arrays.draw_rows, wanted, done, completed, scores)
        return launched

    @torch.inference_mode()
    def run_largest(self, num_tokens: int) -> None:
        """See `ModelRunner.run_largest`."""
        self._inputs.upload_padding(self._rows.padding_row)
        num_tokens = _padded(self._token_sizes, num_tokens)
        shape = num_tokens, self._row_sizes[-1], True, num_tokens
        self._run(("model", *shape), partial(self._run_model, *shape))
        size = self._draw_sizes[-1]
        self._run(("draws", size, False), partial(self._run_draws, size, are_plain=False))

    @torch.inference_mode()
    def warm_up(self) -> None:
        """See `ModelRunner.warm_up`: every decode step, and the steps with prefills that come while others decode."""
        if self._graph_pool is None:
            return
        self._inputs.upload_padding(self._rows.padding_row)
        fewest = _WARM_PREFILLS[0] if self._max_draws_per_row == 1 else 1  # guesses make decodes of several tokens
        largest = self._token_sizes[-1]
        shapes = [(size, size, False) for size in self._row_sizes]
        shapes += [
            (tokens, parts, True)
            for tokens in self._token_sizes
            for fewer_parts, parts in pairwise([0, *self._part_sizes])
            if (fewest <= tokens <= _WARM_PREFILLS[1] or tokens == largest) and fewer_parts < tokens
        ]
        small = [shape for shape in shapes if shape[0] <= _REPLAYED_TOKENS]
        for tokens, parts, has_prefills in [*shapes, *small]:  # these twice: to capture, and to replay
            shape = tokens, parts, has_prefills, self._num_drawing(tokens, parts)
            self._run(("model", *shape, 0), partial(self._run_model, *shape))
        self._warm_up_gathering()
        self._vectors.warm_up(self._hidden)
        for size in [*self._draw_sizes, *self._draw_sizes]:
            for are_plain in (True, False):
                self._run(("draws", size, are_plain), partial(self._run_draws, size, are_plain=are_plain))

    def _warm_up_gathering(self) -> None:
        """Capture the largest step of few long prompts, and compile what those beside many decodes run."""
        num_gathered = self._workspace.fewest_gathered
        if num_gathered:
            tokens, parts = self._token_sizes[-1], self._part_sizes[0]
            shape = tokens, parts, True, self._num_drawing(tokens, parts)
            self._run(("model", *shape, num_gathered), partial(self._run_model, *shape, num_gathered))
            for parts in self._part_sizes[1:]:
                self._run_model(parts, parts, True, parts, num_gathered)

    def _send(self, arrays: StepArrays) -> tuple[int, int, bool, int]:
        """Send a step's arrays, padded.

        Returns:
            Padded tokens, padded parts, whether any part prefills, padded tokens whose hidden states are kept.
        """
        has_prefills = arrays.has_prefills
        num_parts = _padded(self._part_sizes if has_prefills else self._row_sizes, len(arrays.part_rows))
        num_tokens = _padded(self._token_sizes, len(arrays.token_ids)) if has_prefills else num_parts
        num_draws = _padded(self._draw_sizes, len(arrays.draw_rows)) if len(arrays.draw_rows) else 0
        kept_tokens, num_kept = arrays.kept_tokens, self._num_drawing(num_tokens, num_parts)
        num_kept = num_kept if len(kept_tokens) <= num_kept else num_tokens
        inputs, padding_row = self._inputs.next_arrays(), self._rows.padding_row
        fill(inputs["token_ids"], arrays.token_ids, num_tokens, 0)
        fill(inputs["positions"], arrays.positions, num_tokens, 0)
        fill(inputs["token_rows"], arrays.token_rows, num_tokens, padding_row)
        fill(inputs["part_rows"], arrays.part_rows, num_parts, padding_row)
        fill(inputs["query_starts"], arrays.query_starts, num_parts, 0)
        fill(inputs["query_lens"], arrays.query_lens, num_parts, 0)
        fill(inputs["context_lens"], arrays.context_lens, num_parts, 0)
        fill(inputs["kept_tokens"], kept_tokens, num_kept, 0)
        fill(inputs["draw_rows"], arrays.draw_rows, num_draws, padding_row)
        fill(inputs["draw_positions"], arrays.draw_positions, num_draws, 0)
        self._inputs.upload()
        return num_tokens, num_parts, has_prefills, num_kept

    def _run(self, key: tuple[object, ...], run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Replay the graph of `key`; where there is none yet, run kernel by kernel, then capture for next time."""
        captured = self._graphs.get(key)
        if captured is not None:
            captured.graph.replay()
            return captured.output
        output = run()
        if self._graph_pool is not None:
            graph = torch.cuda.CUDAGraph()
            with (
                _no_garbage_collection(),
                torch.cuda.graph(graph, pool=self._graph_pool, capture_error_mode="thread_local"),
            ):
                captured_output = run()
            self._graphs[key] = _Captured(graph, captured_output)
        return output

    def _run_model(
        self, num_tokens: int, num_parts: int, has_prefills: bool, num_kept: int, num_gathered: int = 0
    ) -> torch.Tensor:
        step = PackedStep(
            self._inputs.tokens(num_tokens), self._inputs.parts(num_parts), self._inputs["kept_tokens"][:num_kept],
            has_prefills, num_gathered,
        )  # fmt: skip
        return self.model.run(KernelOperations(self._workspace, step, self._hidden[:num_kept]))

    def _num_drawing(self, num_tokens: int, num_parts: int) -> int:
        """Tokens of a step that may have draws behind them."""
        return min(num_parts * self._max_draws_per_row, num_tokens, self._draw_sizes[-1])

    def _run_draws(self, num_draws: int, *, are_plain: bool) -> torch.Tensor:
        """Draw the tokens of all drawing parts; returns them.

        Draws of one row race for its `last_token_ids`. Nobody reads what stays: where a part draws several tokens, the
        host knows them before it launches the row's next step.
        """
        draw_tokens(
            self._to_logits(self._hidden[:num_draws]),
            self._inputs["draw_rows"][:num_draws],
            self._inputs["draw_positions"][:num_draws],
            self._rows.sampling.tensors,
            self._sampling_workspace,
            self._drawn,
            self._rows.last_token_ids,
            are_plain=are_plain,
        )
        return self._drawn.token_ids

    def _bind(self, drawing: SequenceOf[Drawing]) -> None:
        """Say what draws that a grammar binds may draw.

        This waits for the last step's tokens, while the device runs this step's model.
        """
        if not drawing:
            return
        masks = self._rows.uploads.tensor((len(drawing), self._masks.num_words), torch.int32)
        self._masks.write_draws(drawing, self._last_token_id, masks.numpy())
        self._rows.sampling.bind([part.row for part, _ in drawing], masks)

    def _last_token_id(self, row: int) -> int:
        """The token that the last step drew at `row`; only rows of that step have one that the host has not seen."""
        assert self._last is not None, "a first step's tokens are all known"
        return self._last.last_token_id(row)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect nothing meanwhile: a graph of an engine that was given up, destroyed now, would spoil the capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True, slots=True)
class _Captured:
    """A graph, and the tensor it leaves its result in."""

    graph: torch.cuda.CUDAGraph
    output: torch.Tensor


def _padded_sizes(largest: int, steps_per_octave: int) -> list[int]:
    """Sizes to pad to: 1, 2, 4, 8, then multiples of 8, so many between each power of two and the next."""
    sizes = [1, 2, 4, 8]
    while sizes[-1] < largest:
        octave = 1 << (sizes[-1].bit_length() - 1)
        sizes.append(sizes[-1] + max(octave // steps_per_octave, 8))
    return sizes


def _padded(sizes: list[int], size: int) -> int:
    """The smallest of `sizes` that holds `size`."""
    return sizes[bisect_left(sizes, size)]
