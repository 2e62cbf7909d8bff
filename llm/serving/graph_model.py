"""`GraphModel`: runs the model's part of steps on a GPU, captured as CUDA graphs."""

import gc
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from llm.core.paged_kv_cache import PagedKVCache
from llm.core.recurrent_state import RecurrentStates
from llm.models.adapted_operations import AdaptedOperations
from llm.models.adapters import AdapterMemory
from llm.models.decoder import DecoderModel
from llm.models.kernel_operations import KernelOperations
from llm.models.kernel_workspace import KernelWorkspace
from llm.models.packed_step import PackedStep
from llm.serving.device_rows import DevicePages, make_uploads
from llm.serving.step_adapters import StepAdapters
from llm.serving.step_arrays import StepArrays
from llm.serving.step_inputs import StepInputs, fill

STEPS_AHEAD = 1
_WARM_PREFILLS = 64, 2048
"""Token counts of the steps with prefills that are captured at start, the largest being the one that a burst of
requests begins with; other sizes are captured when they first occur."""
_REPLAYED_TOKENS = 512
"""Graphs of at most this many tokens are also replayed at start: the first replay uploads a graph (`cudaGraphUpload`),
which would delay a step that takes a few milliseconds."""
NUM_BUFFERS = STEPS_AHEAD + 2
"""Number of buffers that the host fills and the device reads: one for each step in flight, and one being filled."""


class GraphModel:
    """Runs the model on a step's arrays, up to the hidden states of the tokens that are kept.

    Steps are captured for each padded number of tokens and parts. The first step of a size runs kernel by kernel and is
    then captured. On a CPU (Triton's interpreter, in tests) every step runs kernel by kernel. Steps that pool more
    tokens than could draw use another graph, which keeps every token's hidden state. Steps that copy contexts out of
    their pages also have graphs of their own; if those contexts are long, the steps always run kernel by kernel,
    because the computation hides the cost of the launches.

    Args:
        model: in evaluation mode, on its device.
        kv_cache: memory of the slot pool, on the same device.
        max_rows: rows that the scheduler hands out.
        max_tokens: token budget of a step.
        table_len: pages of the longest sequence.
        max_draws_per_row: tokens that a row may draw in one step, 1 plus its guesses.
        deterministic: see `KernelWorkspace`.
        num_snapshots: see `RecurrentStates`.
        adapters: slots for adapters that requests choose; None if they cannot. Steps with adapters have graphs of their
            own, so that other steps cost what they cost without.

    Attributes:
        pages: page tables and last tokens of the rows.
        uploads: memory for the data that a step sends.
        inputs: the step's arrays on the device.
        hidden: (most kept, hidden_size), of the tokens that are kept: those that draw, then those that are pooled.
        to_logits: hidden states (rows, hidden_size) → logits (rows, vocab_size), in the model's dtype.
        draw_sizes: numbers of draws that steps are padded to.
        draws_tokens: whether steps may draw, which those of a classifier never do.
    """

    def __init__(
        self,
        model: DecoderModel,
        kv_cache: PagedKVCache,
        *,
        max_rows: int,
        max_tokens: int,
        table_len: int,
        max_draws_per_row: int = 1,
        deterministic: bool = False,
        num_snapshots: int = 0,
        adapters: AdapterMemory | None = None,
    ) -> None:
        self.model = model
        self.adapters = adapters
        device = model.device
        self._row_sizes = _padded_sizes(max_rows, 8)
        self._token_sizes = _padded_sizes(max_tokens, 4)
        self.draw_sizes = _padded_sizes(max_rows * max_draws_per_row, 8)
        self.draws_tokens = model.config.classifier is None
        self._max_draws_per_row = max_draws_per_row
        # Steps with prefills pad their parts generously, which costs little: the number of graphs to capture is the
        # number of token sizes times the number of part sizes.
        self._part_sizes = [*(size for size in (16, 64, 256) if size < self._row_sizes[-1]), self._row_sizes[-1]]
        self.pages = DevicePages(max_rows, table_len, kv_cache.num_groups, kv_cache.scratch_page, device)
        self.uploads = make_uploads(max_rows, model.config.vocab_size, device, NUM_BUFFERS)
        self.most_tokens, most_rows, most_draws = self._token_sizes[-1], self._row_sizes[-1], self.draw_sizes[-1]
        sizes = dict.fromkeys(("token_ids", "positions", "token_rows"), self.most_tokens)
        sizes |= dict.fromkeys(("part_rows", "query_starts", "query_lens", "context_lens"), most_rows)
        sizes |= dict.fromkeys(("draw_rows", "draw_positions"), most_draws)
        most_kept = sizes["kept_tokens"] = max(most_draws, self.most_tokens)
        self._step_adapters = None
        if adapters is not None:
            self._step_adapters = StepAdapters(adapters, most_kept, deterministic=deterministic)
            sizes |= self._step_adapters.sizes
        self.inputs = StepInputs(sizes, device, NUM_BUFFERS)
        self._states = RecurrentStates(model.delta_specs, max_rows, device, model.dtype, num_snapshots)
        self._workspace = KernelWorkspace(
            model, kv_cache, self._states, self.pages.page_tables, self.pages.last_token_ids,
            max_tokens=self.most_tokens, max_parts=most_rows, deterministic=deterministic, adapters=adapters,
        )  # fmt: skip
        self.to_logits = partial(model.logits, head=self._workspace.head)
        self.hidden = torch.zeros(most_kept, model.hidden_size, dtype=model.dtype, device=device)
        self._graphs: dict[tuple[object, ...], _Captured] = {}
        self._graph_pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def launch(self, arrays: StepArrays) -> None:
        """Write the new pages of a step's rows and run the model on it."""
        if len(arrays.pages):
            self.pages.write(arrays.page_places, arrays.pages, self.uploads)
        shape = (*self._send(arrays), arrays.has_adapters)
        num_gathered = self._workspace.attention.num_gathered_tokens(arrays.query_lens, arrays.context_lens)
        self._states.restore(arrays.restored)
        if num_gathered > self._workspace.attention.fewest_gathered:
            self._run_model(*shape, num_gathered)
        else:
            self.run(("model", *shape, num_gathered), partial(self._run_model, *shape, num_gathered))
        self._states.save(arrays.saved)

    @property
    def captures(self) -> bool:
        """Whether steps are captured, which is so on a GPU."""
        return self._graph_pool is not None

    def warm_draws(self) -> list[tuple[int, bool]]:
        """Sizes of draws to capture, and whether they are plain; each twice: once to capture, once to replay."""
        sizes = [*self.draw_sizes, *self.draw_sizes] if self.draws_tokens else []
        return [(size, plain) for size in sizes for plain in (True, False)]

    def draw_size(self, num_draws: int) -> int:
        """The size to which this many draws are padded."""
        return _padded(self.draw_sizes, num_draws)

    def run_largest(self, num_tokens: int) -> None:
        """Run the largest step of this many tokens, which belong to no sequence; capture it if steps are captured."""
        self.inputs.upload_padding(self.pages.padding_row)
        num_tokens = _padded(self._token_sizes, num_tokens)
        shape = num_tokens, self._row_sizes[-1], True, num_tokens, self.adapters is not None
        self.run(("model", *shape, 0), partial(self._run_model, *shape))

    def warm_up(self) -> None:
        """Capture every decode step, and the steps with prefills that occur while others decode."""
        self.inputs.upload_padding(self.pages.padding_row)
        fewest = _WARM_PREFILLS[0] if self._max_draws_per_row == 1 else 1  # guesses give decodes several tokens
        largest = self._token_sizes[-1]
        shapes = [(size, size, False) for size in self._row_sizes]
        shapes += [
            (tokens, parts, True)
            for tokens in self._token_sizes
            for fewer_parts, parts in pairwise([0, *self._part_sizes])
            if (fewest <= tokens <= _WARM_PREFILLS[1] or tokens == largest) and fewer_parts < tokens
        ]
        small = [shape for shape in shapes if shape[0] <= _REPLAYED_TOKENS]
        for tokens, parts, has_prefills in [*shapes, *small]:  # these twice: once to capture, once to replay
            for has_adapters in (False,) if self.adapters is None else (False, True):
                shape = tokens, parts, has_prefills, self._num_drawing(tokens, parts), has_adapters
                self.run(("model", *shape, 0), partial(self._run_model, *shape))
        self._warm_up_gathering()

    def _warm_up_gathering(self) -> None:
        """Capture the largest step with a few long prompts, and compile the kernels of those beside many decodes."""
        num_gathered = self._workspace.attention.fewest_gathered
        if num_gathered:
            tokens, parts = self._token_sizes[-1], self._part_sizes[0]
            for has_adapters in (False,) if self.adapters is None else (False, True):
                shape = tokens, parts, True, self._num_drawing(tokens, parts), has_adapters
                self.run(("model", *shape, num_gathered), partial(self._run_model, *shape, num_gathered))
            for parts in self._part_sizes[1:]:
                self._run_model(parts, parts, True, parts, False, num_gathered)

    def _send(self, arrays: StepArrays) -> tuple[int, int, bool, int]:
        """Send a step's arrays, padded.

        Returns:
            Padded tokens, padded parts, whether any part prefills, padded tokens whose hidden states are kept.
        """
        has_prefills = arrays.has_prefills
        num_parts = _padded(self._part_sizes if has_prefills else self._row_sizes, len(arrays.part_rows))
        # Graphs of shorter steps are not captured at start. With adapters that would be another pause for each of them.
        fewest = min(_WARM_PREFILLS[0], self.most_tokens) if arrays.has_adapters else 1
        num_tokens = _padded(self._token_sizes, max(len(arrays.token_ids), fewest)) if has_prefills else num_parts
        num_draws = _padded(self.draw_sizes, len(arrays.draw_rows)) if len(arrays.draw_rows) else 0
        kept_tokens, num_kept = arrays.kept_tokens, self._num_drawing(num_tokens, num_parts)
        num_kept = num_kept if len(kept_tokens) <= num_kept else num_tokens
        inputs, padding_row = self.inputs.next_arrays(), self.pages.padding_row
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
        if self._step_adapters is not None and arrays.has_adapters:
            self._step_adapters.fill(inputs, arrays.token_adapters, kept_tokens, num_tokens, num_kept)
        self.inputs.upload()
        return num_tokens, num_parts, has_prefills, num_kept

    def run(self, key: tuple[object, ...], run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Replay the graph of `key`; if there is none yet, run kernel by kernel, then capture it for the next time."""
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
        self, num_tokens: int, num_parts: int, has_prefills: bool, num_kept: int, has_adapters: bool,
        num_gathered: int = 0,
    ) -> torch.Tensor:  # fmt: skip
        adapters = None
        if has_adapters:
            assert self._step_adapters is not None, "there are slots"
            adapters = self._step_adapters.of(self.inputs, num_tokens, num_kept)
        step = PackedStep(
            self.inputs.tokens(num_tokens), self.inputs.parts(num_parts), self.inputs["kept_tokens"][:num_kept],
            has_prefills, num_gathered, adapters,
        )  # fmt: skip
        operations = AdaptedOperations if has_adapters else KernelOperations
        return self.model.run(operations(self._workspace, step, self.hidden[:num_kept]))

    def _num_drawing(self, num_tokens: int, num_parts: int) -> int:
        """Number of a step's tokens that may have draws after them."""
        return min(num_parts * self._max_draws_per_row, num_tokens, self.draw_sizes[-1])


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Suspend garbage collection: destroying a graph of a discarded engine now would spoil the capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True, slots=True)
class _Captured:
    """A graph, and the tensor that holds its result."""

    graph: torch.cuda.CUDAGraph
    output: torch.Tensor


def _padded_sizes(largest: int, steps_per_octave: int) -> list[int]:
    """Sizes to pad to: 1, 2, 4, 8, then multiples of 8, this many between each power of two and the next."""
    sizes = [1, 2, 4, 8]
    while sizes[-1] < largest:
        octave = 1 << (sizes[-1].bit_length() - 1)
        sizes.append(sizes[-1] + max(octave // steps_per_octave, 8))
    return sizes


def _padded(sizes: list[int], size: int) -> int:
    """The smallest of `sizes` that holds `size`."""
    return sizes[bisect_left(sizes, size)]
