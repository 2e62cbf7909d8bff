"""`DecoderModel`: a decoder of any family, shaped by `ModelConfig`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from llm.attention.dense import DenseContext
from llm.attention.interface import AttentionContext
from llm.attention.spec import AttentionSpec
from llm.config import ModelConfig, describe
from llm.core.kv_cache import KVCache
from llm.core.page_groups import PageGroup, page_groups_of
from llm.core.partition import WHOLE, Exchange, Partition
from llm.core.recurrent_state import DeltaSpec, RecurrentCache
from llm.errors import CapacityError, ConfigError
from llm.models.adapters import TokenAdapters
from llm.models.cuts import find_cut, held_shape, hold_experts
from llm.models.experts import Experts
from llm.models.family import Layer
from llm.models.layers import RMSNorm
from llm.models.lora import merge_lora
from llm.models.operations import Operations, TorchOperations
from llm.models.quantized import quantized_modules, use_formats
from llm.models.registry import FAMILIES, parts_of_modules

_INIT_STD = 0.02
Head = Callable[[torch.Tensor, nn.Module, float | None], torch.Tensor]
"""Multiplies rows (…, in) by a module's weight (out, in). With a soft cap, the product x becomes
`soft_cap * tanh(x / soft_cap)`."""


class DecoderModel(nn.Module):
    """Decoder-only transformer with random weights; `llm.checkpoint.loading` fills it from a checkpoint.

    Args:
        device: where the parameters live; "meta" for shapes without memory.
        dtype: data type of the parameters and activations.
        partition: which part of the model this is. A part can run once `exchange` is set.
        shape: fields of `ModelConfig`: vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, window_size, …

    Attributes:
        config: shape of the whole model.
        held: shape of the part that this process holds.
        exchange: communication with the ranks that hold the other parts; None if this is the whole model.

    Raises:
        ConfigError: a field is unknown or out of bounds, or the model cannot be split this way.
    """

    cache_scales: torch.Tensor | None
    """(layers, 2) float32, the checkpoint's divisors for 8-bit keys and values; None if it has none."""

    def __init__(
        self,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        partition: Partition = WHOLE,
        **shape: Any,
    ) -> None:
        super().__init__()
        try:
            self.config = config = ModelConfig(**shape)
        except ValidationError as error:
            raise ConfigError(describe(error)) from error
        family = FAMILIES.get(config.architecture)
        if family is None:
            raise ConfigError(f"architecture {config.architecture!r} is unknown; known: {', '.join(FAMILIES)}")
        self.partition = partition
        self.exchange: Exchange | None = None
        self.held = held = held_shape(config, partition)
        with torch.device("meta"):
            self.embed_tokens = nn.Embedding(held.vocab_size, config.hidden_size)
            self.layers = nn.ModuleList(family.make_layers(held))
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset)
            has_head = not config.tie_embeddings and config.classifier is None
            self.lm_head = nn.Linear(config.hidden_size, held.vocab_size, False) if has_head else None
            num_labels = config.num_labels
            self.score = nn.Linear(config.hidden_size, num_labels, False) if num_labels else None
            if partition.by_expert and partition.size > 1:
                hold_experts(self.layers.modules(), partition)
        for name in parts_of_modules(config) if partition.size > 1 else ():
            find_cut(config, partition, name)  # raises if it cannot be split
        self.to(dtype)
        use_formats(self, config, parts_of_modules(config), dtype)
        has_scales = config.quantization is not None and config.quantization.has_cache_scales
        scales = torch.empty(config.num_layers, 2, device="meta") if has_scales else None
        self.register_buffer("cache_scales", scales, persistent=False)
        if torch.device(device).type != "meta":
            self.to_empty(device=device)
            self._init_weights()

    @classmethod
    def from_config(
        cls,
        config: ModelConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        partition: Partition = WHOLE,
    ) -> Self:
        """Make a model of this shape, or a part of one, with random weights."""
        return cls(device=device, dtype=dtype, partition=partition, **config.model_dump())

    @torch.no_grad()
    def _init_weights(self) -> None:
        quantized = dict(quantized_modules(self))
        for module in quantized.values():
            module.reset_parameters()
        if self.cache_scales is not None:
            self.cache_scales.fill_(1)
        for name, parameter in self.named_parameters():
            if name.rpartition(".")[0] in quantized:
                continue
            if name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(std=_INIT_STD)
        for norm in (module for module in self.modules() if isinstance(module, RMSNorm)):
            norm.weight.fill_(1 - (norm.offset or 0))

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.config.num_layers

    @property
    def layer_specs(self) -> list[AttentionSpec | DeltaSpec]:
        """The spec of each layer: of its attention, or of the gated delta rule that it has instead."""
        layers = cast(Iterable[Layer], self.layers)
        return [layer.spec if layer.delta_spec is None else layer.delta_spec for layer in layers]

    @property
    def attention_specs(self) -> dict[int, AttentionSpec]:
        """Specs of the layers with attention, by index."""
        return {i: spec for i, spec in enumerate(self.layer_specs) if isinstance(spec, AttentionSpec)}

    @property
    def delta_specs(self) -> dict[int, DeltaSpec]:
        """Specs of the layers with a gated delta rule, by index."""
        return {i: spec for i, spec in enumerate(self.layer_specs) if isinstance(spec, DeltaSpec)}

    @property
    def page_groups(self) -> list[PageGroup]:
        """Which layers share pages."""
        return page_groups_of(self.config)

    @property
    def experts(self) -> Experts | None:
        """The experts of the first layer that has any; all such layers have the same shape. None if no layer has
        any."""
        return next((module for module in self.layers.modules() if isinstance(module, Experts)), None)

    @property
    def num_heads(self) -> int:
        """Number of query heads that this process holds."""
        return self.held.num_heads

    @property
    def num_kv_heads(self) -> int:
        """Number of key/value heads that this process holds."""
        return self.held.kv_heads

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.config.hidden_size

    @property
    def max_seq_len(self) -> int:
        """Longest sequence in tokens."""
        return self.config.max_seq_len

    @property
    def dtype(self) -> torch.dtype:
        """Data type of parameters and activations."""
        return self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.embed_tokens.weight.device

    def forward(
        self,
        input_ids: torch.Tensor | Sequence[int],
        kv_caches: Sequence[KVCache | RecurrentCache] | None = None,
        use_cache: bool = False,
    ) -> torch.Tensor:
        """Logits of every new token.

        Args:
            input_ids: (batch, seq) token ids, all sequences of one length; a list or 1-D tensor is a batch of one.
            kv_caches: one cache per layer, a `RecurrentCache` for a layer that keeps a state. They are updated in
                place; later calls pass only the tokens that follow.
            use_cache: read and write `kv_caches`. Without it they are ignored and `input_ids` is the whole sequence.

        Returns:
            (batch, seq, vocab_size); of a classifier (batch, seq, num_labels), of which only the last token's count.

        Raises:
            CapacityError: more tokens than the model's or the caches' `max_seq_len`.
            ValueError: `use_cache` without one cache of the right kind per layer, no tokens, or a token id outside the
                vocabulary.
        """
        token_ids = self._as_batch(input_ids)
        caches = None
        if use_cache:
            if kv_caches is None or len(kv_caches) != self.num_layers:
                raise ValueError(f"use_cache=True needs one KVCache for each of the {self.num_layers} layers")
            if any(isinstance(kv_caches[layer], KVCache) for layer in self.delta_specs):
                raise ValueError("layers of this model keep a state, which no KVCache holds: use make_kv_caches()")
            caches = kv_caches
        start = caches[0].length if caches else 0
        end = start + token_ids.shape[1]
        if end > self.max_seq_len:
            raise CapacityError(f"{end} tokens exceed the model's max_seq_len={self.max_seq_len}")
        for spec in self.attention_specs.values():
            spec.rope.reach(end)
        positions = torch.arange(start, end, device=self.device)
        return self.logits(self.hidden_states(token_ids, positions, DenseContext(caches)))

    def run(self, operations: Operations[Any]) -> torch.Tensor:
        """Run a forward pass with these operations; returns the final hidden states of the requested tokens."""
        operations.embed(self.embed_tokens, self.config.embedding_scale)
        for layer in self.layers:
            layer(operations)
        return operations.norm(self.norm)

    def hidden_states(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        context: AttentionContext,
        kept: torch.Tensor | None = None,
        adapters: TokenAdapters | None = None,
    ) -> torch.Tensor:
        """Final hidden states, (…, hidden_size), of `token_ids` (…) at `positions`, which broadcasts to them.

        Args:
            kept: (kept,) indices into (tokens,) token ids: only their hidden states are returned. None for all.
            adapters: those of the tokens, (tokens,); None if no token has one.
        """
        return self.run(
            TorchOperations(
                token_ids, positions, context, kept=kept, last_layer=self.num_layers - 1, partition=self.partition,
                exchange=self.exchange, adapters=adapters,
            )
        )  # fmt: skip

    def logits(self, hidden: torch.Tensor, head: Head | None = None) -> torch.Tensor:
        """Hidden states (…, hidden_size) → logits (…, vocab_size); of a classifier (…, num_labels) in float32.

        Args:
            head: the function that computes the logits of tokens; None for PyTorch's.
        """
        if self.score is not None:  # few numbers, which the caller compares with others: they keep their digits
            return F.linear(hidden.float(), self.score.weight.float())
        module = self.embed_tokens if self.lm_head is None else self.lm_head
        logits = (head or _torch_head)(hidden, module, self.config.logit_soft_cap)
        if self.exchange is None:
            return logits
        return self.exchange.gather_columns(logits.contiguous())[..., : self.config.vocab_size].contiguous()

    def fit_context(self, context_len: int) -> None:
        """Prepare for sequences of at most this many tokens; see `RotaryEmbedding.fit_context`."""
        for spec in self.attention_specs.values():
            spec.rope.fit_context(context_len)

    def make_kv_caches(self, max_batch_size: int, max_seq_len: int | None = None) -> list[KVCache | RecurrentCache]:
        """Caches that fit this model. Each layer has its own sliding window, so that windowed caches stay O(window)."""
        max_seq_len = max_seq_len or self.max_seq_len
        caches: list[KVCache | RecurrentCache] = []
        for spec in self.layer_specs:
            if isinstance(spec, DeltaSpec):
                caches.append(RecurrentCache(max_batch_size, spec, self.device, self.dtype))
            else:
                caches.append(
                    KVCache(
                        max_batch_size, max_seq_len, spec.num_kv_heads, spec.head_dim, self.device, self.dtype,
                        spec.window, None if spec.has_values else 0,
                    )
                )  # fmt: skip
        return caches

    def merge_lora(self) -> Self:
        """Fold loaded LoRA adapters into the weights, so that they cost nothing. Does nothing if called again."""
        merge_lora(self)
        return self

    def _as_batch(self, input_ids: torch.Tensor | Sequence[int]) -> torch.Tensor:
        token_ids = torch.as_tensor(input_ids, device=self.device)
        if token_ids.dim() == 1:
            token_ids = token_ids.unsqueeze(0)
        if token_ids.dim() != 2 or token_ids.shape[1] == 0:
            raise ValueError(
                f"input_ids has shape {tuple(token_ids.shape)}; expected (batch, seq) with at least one token"
            )
        if (
            token_ids.device.type == "cpu"
            and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < self.config.vocab_size
        ):
            raise ValueError(f"input_ids holds an id outside the vocabulary of {self.config.vocab_size} tokens")
        return token_ids.long()


def _torch_head(hidden: torch.Tensor, module: nn.Module, soft_cap: float | None) -> torch.Tensor:
    logits = F.linear(hidden, module.get_parameter("weight"))
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
