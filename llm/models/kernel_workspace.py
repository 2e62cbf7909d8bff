"""`KernelWorkspace`: what all steps of an engine share when they run by this project's own kernels."""

from typing import cast

import torch
from torch import nn

from llm.core.paged_kv_cache import PagedKVCache
from llm.core.recurrent_state import RecurrentStates
from llm.kernels.experts import ExpertMixture
from llm.kernels.linear import Linear, Weights
from llm.kernels.soft_cap import cap_softly
from llm.models.adapters import AdapterMemory
from llm.models.decoder import DecoderModel
from llm.models.kernel_adapters import KernelAdapters
from llm.models.kernel_arguments import expert_shape_of
from llm.models.kernel_attention import KernelAttention


class KernelWorkspace:
    """What the passes of one engine share: pages, their tables, and the kernels' own memory.

    Args:
        model: the model that steps run.
        kv_cache: memory of the slot pool.
        states: memory of the layers with a gated delta rule.
        page_tables: (groups, rows, pages a row) int32, for each group of layers each row's pages in order of position.
        last_token_ids: (rows,) int32, the token that each row drew last.
        max_tokens: most tokens a step.
        max_parts: most parts a step.
        deterministic: a token's result, bit by bit, depends on the tokens before it in its sequence alone: not on what
            else is in the step, nor on the steps and chunks in which those came.
        adapters: slots of adapters that tokens may have; None for none.
    """

    def __init__(
        self,
        model: DecoderModel,
        kv_cache: PagedKVCache,
        states: RecurrentStates,
        page_tables: torch.Tensor,
        last_token_ids: torch.Tensor,
        *,
        max_tokens: int,
        max_parts: int,
        deterministic: bool = False,
        adapters: AdapterMemory | None = None,
    ) -> None:
        device = page_tables.device
        self.states = states
        self.kv_cache = kv_cache
        self.page_tables = page_tables
        self.last_token_ids = last_token_ids
        self.dtype = model.dtype
        self.deterministic = deterministic
        self.partition = model.partition
        self.exchange = model.exchange
        self.adapters = None if adapters is None else KernelAdapters(adapters, deterministic=deterministic)
        self.linear = Linear(device, deterministic=deterministic, exchange=model.exchange)
        self.experts = None
        experts = model.experts
        if experts is not None:
            shape = expert_shape_of(experts)
            held = experts.held if model.partition.by_expert and model.exchange is not None else None
            self.experts = ExpertMixture(shape, max_tokens, self.dtype, device, deterministic=deterministic, held=held)
        self.last_layer = model.num_layers - 1
        self.attention = KernelAttention(
            list(model.attention_specs.values()), page_tables, kv_cache.page_size, self.dtype,
            max_tokens=max_tokens, max_parts=max_parts, deterministic=deterministic,
        )  # fmt: skip

    def head(self, rows: torch.Tensor, module: nn.Module, soft_cap: float | None) -> torch.Tensor:
        """Rows (rows, in), contiguous, by a module's weight in the rows' dtype, (out, in): (rows, out), bounded."""
        logits = cast(torch.Tensor, self.linear(rows, Weights(module.get_parameter("weight"))))
        if soft_cap is not None:
            cap_softly(logits, soft_cap)
        return logits
