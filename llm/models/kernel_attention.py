"""`KernelAttention`: attention of an engine's steps over its pages, by this project's own kernels."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from llm.attention.spec import AttentionSpec
from llm.kernels.attention import hopper_prefill
from llm.kernels.attention.decode import PagedDecode
from llm.kernels.attention.latent import LatentAttention
from llm.kernels.attention.prefill import PrefillScratch, paged_prefill, prefill_block_tokens
from llm.kernels.attention.work import (
    Scoring,
    WorkItems,
    num_decode_items,
    num_prefill_items,
    plan_decodes,
    plan_prefills,
)
from llm.models.packed_step import PackedStep


class KernelAttention:
    """The kernels that attend, their memory, and how a step's work is shared out among their programs.

    Parts with one new token are decodes, which have a kernel of their own; all others are prefills. If it is to be
    deterministic, every part is a prefill: one kernel, in tiles of one size.

    Args:
        specs: of the layers with attention; all have the same shape.
        page_tables: (groups, rows, pages a row) int32, for each group of layers each row's pages in order of position.
        page_size: tokens in a page.
        dtype: of the activations.
        max_tokens: most tokens a step.
        max_parts: most parts a step.
        deterministic: see `KernelWorkspace`.

    Attributes:
        angles: the table and the scales of queries, if any, of each rotary embedding; kept here, because captured
            graphs read them even after the model is fitted to another context.
    """

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        page_tables: torch.Tensor,
        page_size: int,
        dtype: torch.dtype,
        *,
        max_tokens: int,
        max_parts: int,
        deterministic: bool,
    ) -> None:
        spec, device = specs[0], page_tables.device
        assert len({(s.num_heads, s.num_kv_heads, s.head_dim, s.value_dim) for s in specs}) == 1, "several shapes"
        self.angles = {each.rope: (each.rope.table(device), each.rope.query_scales(device)) for each in specs}
        self._page_tables = page_tables
        self._page_size = page_size
        self._deterministic = deterministic
        heads = self._shape = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self._itemsize = dtype.itemsize
        self._latents: LatentAttention | None = None
        if spec.value_dim is None:
            self._decode = PagedDecode(max_parts, *heads, device)
            self._prefill_scratch = None if deterministic else PrefillScratch(*heads, dtype, device)
        else:
            self._latents = LatentAttention(
                max_parts, spec.num_heads, spec.value_dim, spec.head_dim, spec.softmax_scale, dtype, device,
                deterministic=deterministic,
            )  # fmt: skip
        windows = {each.window for each in specs}
        self._decode_items = {
            window: WorkItems.allocate(num_decode_items(max_parts), max_parts, device) for window in windows
        }
        self._min_prefill_len = 1 if deterministic else 2
        num_items = num_prefill_items(max_tokens, max_parts, self._block_tokens(), self._min_prefill_len)
        self._prefill_items = WorkItems.allocate(num_items, max_parts, device)
        self._long_prefill: hopper_prefill.HopperPrefill | None = None
        is_plain = self._latents is None and windows == {None} and all(each.is_plain for each in specs)
        if is_plain and not deterministic and hopper_prefill.can_run(dtype, spec.head_dim, device):
            max_context = page_tables.shape[2] * page_size + max_tokens  # the end of one long prompt, others behind it
            self._long_prefill = hopper_prefill.HopperPrefill(
                *heads, max_context=max_context, max_tokens=max_tokens, max_parts=max_parts, dtype=dtype, device=device
            )

    @property
    def fewest_gathered(self) -> int:
        """The least that `num_gathered_tokens` gives beside 0: what one graph does for. 0 where it never gives more."""
        return 0 if self._long_prefill is None else self._long_prefill.few_tokens

    def num_gathered_tokens(self, query_lens: npt.NDArray[np.int32], context_lens: npt.NDArray[np.int32]) -> int:
        """Tokens of context that a step of such parts is to copy out of their pages; 0 where that does not pay."""
        if self._long_prefill is None:
            return 0
        return self._long_prefill.num_gathered_tokens(query_lens, context_lens)

    def plan(self, step: PackedStep) -> None:
        """Share the step's attention out among programs; every layer goes by that."""
        if self._deterministic:  # every token through the same kernel, in tiles of one size
            block_tokens = self._block_tokens()
        else:
            block_tokens = self._block_tokens(len(step.tokens.positions))
            for window, items in self._decode_items.items():
                plan_decodes(step.parts, items, window)
        if step.num_gathered:
            assert self._long_prefill is not None, "it asks for this"
            self._long_prefill.plan(
                step.parts, self._page_tables[0], self._page_size, step.num_gathered, self._prefill_items
            )
        elif step.has_prefills or self._deterministic:
            plan_prefills(step.parts, self._prefill_items, block_tokens, self._min_prefill_len)

    def attend(
        self,
        step: PackedStep,
        query: torch.Tensor,
        kv_pages: torch.Tensor,
        page_tables: torch.Tensor,
        window: int | None,
        scoring: Scoring,
        output: torch.Tensor,
    ) -> None:
        """Write what the queries of the step planned last find in a layer's pages to `output`.

        Args:
            query, output: (tokens, num_heads, head_dim).
            kv_pages: the layer's keys and values.
            page_tables: (rows, pages a row), those of the layer's group.
            window: of the layer, in tokens; None for all.
        """
        if not self._deterministic:
            self._decode(query, kv_pages, page_tables, step.parts, self._decode_items[window], window, output, scoring)
        if step.num_gathered:
            assert self._long_prefill is not None, "it has asked for this"
            self._long_prefill(
                query, kv_pages, step.parts, self._prefill_items, step.num_gathered, output, scoring.scale
            )
        elif step.has_prefills or self._deterministic:
            paged_prefill(
                query, kv_pages, page_tables, step.parts, self._prefill_items, window, output, self._prefill_scratch,
                scoring=scoring, deterministic=self._deterministic,
            )  # fmt: skip

    def attend_latents(
        self,
        step: PackedStep,
        query: torch.Tensor,
        pages: torch.Tensor,
        page_tables: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """`attend` for a layer that keeps latents: `query` (tokens, num_heads, head_dim) asks for those,
        and `output` is (tokens, num_heads, value_size)."""
        assert self._latents is not None, "a model with latents"
        if not self._deterministic:
            self._latents.decode(query, pages, page_tables, step.parts, self._decode_items[None], output)
        if step.has_prefills or self._deterministic:
            self._latents.prefill(query, pages, page_tables, step.parts, self._prefill_items, output)

    def _block_tokens(self, num_tokens: int = 0) -> int:
        """New tokens of an item of prefills, in a step of so many tokens; with 0 for all steps."""
        if self._latents is not None:
            return self._latents.block_tokens
        num_heads, num_kv_heads, head_dim = self._shape
        return prefill_block_tokens(num_heads, num_kv_heads, head_dim * self._itemsize, num_tokens)
