"""`ModelConfig`: the shape of a decoder."""

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from llm.config.quantization import Quantization
from llm.config.strict_model import StrictModel

_MAX_SIZE, _MAX_HEADS, _MAX_LAYERS, _MAX_CONTEXT = 2**22, 4096, 1024, 2**24
"""Several times what the largest models have. A file with a mistake would otherwise ask for more than can be counted:
the table of positions alone is as long as the context."""


class RopeScalingType(StrEnum):
    """How rotary frequencies are stretched past the trained context."""

    LINEAR = "linear"
    LLAMA3 = "llama3"
    YARN = "yarn"
    LONGROPE = "longrope"


class RopeScaling(StrictModel):
    """Rotary-embedding scaling, with Hugging Face's field names.

    linear: Chen et al. 2023 (arXiv:2306.15595). yarn: Peng et al. 2023 (arXiv:2309.00071). llama3: Meta's
    Llama 3.1 release. longrope: Ding et al. 2024 (arXiv:2402.13753).
    """

    rope_type: RopeScalingType
    factor: float = Field(gt=0)
    """Context length divided by `original_max_position_embeddings`."""
    original_max_position_embeddings: int | None = Field(default=None, gt=0)
    """Context length, in tokens, that the checkpoint was trained with."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """llama3: wavelengths above `original / low_freq_factor` are divided by `factor`."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """llama3: wavelengths below `original / high_freq_factor` stay unchanged."""
    attention_factor: float | None = Field(default=None, gt=0)
    """yarn, longrope: multiplies cos and sin. None for the papers' values: `0.1 ln(factor) + 1` for yarn, and the
    square root of `1 + ln(factor) / ln(original)` for longrope."""
    attn_factor: float = Field(default=1.0, gt=0)
    """yarn: multiplies what the other fields make the attention factor, as in YaRN's own code and DeepSeek's files.
    transformers leaves it out of account."""
    beta_fast: float = Field(default=32.0, gt=0)
    """yarn: a dimension with more rotations than this over the trained context stays unchanged."""
    beta_slow: float = Field(default=1.0, gt=0)
    """yarn: a dimension with fewer rotations than this over the trained context is fully interpolated."""
    mscale: float | None = Field(default=None, ge=0)
    """yarn: together with `mscale_all_dim`, another way to give the attention factor, unless one of them is 0."""
    mscale_all_dim: float | None = Field(default=None, ge=0)
    truncate: bool = True
    """yarn: round the correction range to whole dimensions."""
    short_factor: tuple[float, ...] | None = None
    """longrope: divisors of the frequencies, one for each pair of dimensions. They apply if no sequence can be longer
    than the context that the checkpoint was trained with."""
    long_factor: tuple[float, ...] | None = None
    """longrope: the divisors that apply if sequences can be longer."""

    llama_4_scaling_beta: float | None = Field(default=None, ge=0)
    """The query at position p is multiplied by `1 + beta ln(1 + floor(p / original))` (Ministral 3)."""

    @model_validator(mode="after")
    def _check_factors(self) -> Self:
        if self.rope_type is RopeScalingType.LONGROPE and (self.short_factor is None or self.long_factor is None):
            raise ValueError("longrope needs short_factor and long_factor")
        return self


class Activation(StrEnum):
    """Activation function that a gated feed-forward applies to its gate (Shazeer 2020, arXiv:2002.05202)."""

    SILU = "silu"
    """SwiGLU."""
    GELU_TANH = "gelu_tanh"
    """GeGLU, with the tanh approximation of GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""


class DeltaConfig(StrictModel):
    """Layers with a gated delta rule in place of attention (Yang et al. 2024, arXiv:2412.06464)."""

    layers: tuple[int, ...] = Field(min_length=1)
    """Indices of these layers, counted from 0, each listed once."""
    num_key_heads: int = Field(gt=0)
    """Number of query heads, and also of key heads."""
    num_value_heads: int = Field(gt=0)
    """Number of value heads, a multiple of `num_key_heads`."""
    key_dim: int = Field(gt=0)
    """Width of a query or key head."""
    value_dim: int = Field(gt=0)
    """Width of a value head."""
    kernel_size: int = Field(default=4, gt=1)
    """Number of tokens that the short convolution before the rule spans, including the current one."""

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers {self.layers} names a layer twice")
        if self.num_value_heads % self.num_key_heads:
            raise ValueError(
                f"num_value_heads {self.num_value_heads} is not a multiple of num_key_heads {self.num_key_heads}"
            )
        return self


class LatentConfig(StrictModel):
    """Attention that keeps one vector per token, its latent. Each head's key and value are projected from it
    (DeepSeek-V2's MLA, arXiv:2405.04434)."""

    rank: int = Field(gt=0)
    """Width of the latent."""
    query_rank: int | None = Field(default=None, gt=0)
    """Width of the latent that queries are projected from; None if they are projected from the normalized residual
    stream itself."""
    plain_dim: int = Field(gt=0)
    """How many numbers of a head's query and key are not rotated."""
    rope_dim: int = Field(gt=0)
    """How many numbers after them are rotated. All heads share those of the key, which are kept next to the latent."""
    value_dim: int = Field(gt=0)
    """Width of a head's value."""
    is_interleaved: bool = True
    """RoPE pairs neighboring numbers, instead of each number of the first half with one of the second."""


class RoutingConfig(StrictModel):
    """How a router scores experts and chooses among them."""

    uses_sigmoid: bool = False
    """An expert's score is the sigmoid of its logit, and experts are chosen by this score plus a bias of each expert
    (DeepSeek-V3, arXiv:2412.19437). Otherwise the scores are a softmax of all logits."""
    num_groups: int = Field(default=1, gt=0)
    """Number of groups of neighboring experts; a token first chooses the best groups (DeepSeek-V2,
    arXiv:2405.04434)."""
    num_top_groups: int = Field(default=1, gt=0)
    """How many of these groups a token chooses."""
    scale: float = Field(default=1.0, gt=0)
    """Factor on the weights of a token's experts, applied last."""


class ClassifierConfig(StrictModel):
    """A head that gives labels to a text, from the final hidden state of its last token."""

    num_labels: int = Field(gt=0)
    """Number of labels; each gets a logit."""
    pad_token_id: int | None = None
    """Token that fills up texts. As in transformers, a text's last token is the last one that differs from it. None if
    there is no such token."""


class ModelConfig(StrictModel):
    """Shape of a decoder: everything that `DecoderModel` needs, and nothing about serving."""

    architecture: str = "LlamaForCausalLM"
    """Name of the family's class in transformers."""
    vocab_size: int = Field(default=32000, gt=0, le=_MAX_SIZE)
    hidden_size: int = Field(default=512, gt=0, le=_MAX_SIZE)
    intermediate_size: int | None = Field(default=None, gt=0, le=_MAX_SIZE)
    """Width of the gated MLP; None for 8/3 of `hidden_size` rounded up to a multiple of 64."""
    activation: Activation = Activation.SILU
    num_layers: int = Field(default=6, gt=0, le=_MAX_LAYERS)
    num_heads: int = Field(default=8, gt=0, le=_MAX_HEADS)
    """Query heads."""
    num_kv_heads: int | None = Field(default=None, gt=0, le=_MAX_HEADS)
    """Key/value heads: None for `num_heads` (MHA), 1 for MQA, or a divisor of `num_heads` in between (GQA)."""
    head_dim: int | None = Field(default=None, gt=0, le=_MAX_SIZE)
    """None for `hidden_size / num_heads`."""
    max_seq_len: int = Field(default=2048, gt=0, le=_MAX_CONTEXT)
    """Longest sequence, prompt and output together, in tokens."""
    window_size: int | None = Field(default=None, gt=0)
    """Sliding window: a token attends to itself and the `window_size - 1` tokens before it. None for all."""
    window_layers: tuple[int, ...] | None = None
    """Layers that the window applies to; None for every layer."""
    attention_scale: float | None = Field(default=None, gt=0)
    """Softmax scale; None for `1 / sqrt(head_dim)`."""
    attention_soft_cap: float | None = Field(default=None, gt=0)
    """Bound that a tanh puts on attention scores (Gemma 2); None for no bound."""
    attention_sinks: bool = False
    """Each query head has a sink: one more score, beside those of the tokens, that belongs to no token (gpt-oss)."""
    logit_soft_cap: float | None = Field(default=None, gt=0)
    """The same bound for logits."""
    embedding_scale: float | None = Field(default=None, gt=0)
    """Factor on embeddings, rounded to the model's format (Gemma); None for no factor."""
    latent: LatentConfig | None = None
    """Attention that keeps latents instead of keys and values, and attends to them as one key/value head of
    `rank + rope_dim` numbers. None for keys and values."""
    delta: DeltaConfig | None = None
    """Layers that have no attention and keep a state of fixed size instead; None for none."""
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    norm_offset: float | None = None
    """Number added to the weights of norms, which then scale in float32 (Gemma: 1). None for scaling in the model's
    format, with nothing added (Llama)."""
    rope_theta: float = Field(default=10000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    window_rope_theta: float | None = Field(default=None, gt=0)
    """RoPE base in layers with a window, where angles are not scaled (Gemma 3). None for the same RoPE in all
    layers."""
    partial_rotary_factor: float = Field(default=1.0, gt=0, le=1)
    """Fraction of each head, from its beginning, that RoPE rotates."""
    qk_norm: bool = False
    """RMSNorm over each head's query and key before RoPE (Qwen3)."""
    attention_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""
    attention_gate: bool = False
    """A gate on each head's output, projected beside its query (Qwen3.5)."""
    attention_output_bias: bool = False
    """Bias on the attention output projection (Llama with `attention_bias`)."""
    mlp_bias: bool = False
    tie_embeddings: bool = False
    """The output head shares the token embedding's weight."""
    classifier: ClassifierConfig | None = None
    """A head for labels, which the model has in place of the output head; None for a model that generates tokens."""
    num_experts: int = Field(default=0, ge=0, le=_MAX_HEADS)
    """Number of experts that a layer has instead of an MLP; 0 for a model without experts."""
    num_experts_per_token: int = Field(default=2, gt=0)
    """Number of experts that each token goes to."""
    expert_size: int = Field(default=0, ge=0, le=_MAX_SIZE)
    """Width of an expert's SwiGLU."""
    normalize_expert_weights: bool = True
    """The weights of a token's experts add up to 1."""
    routing: RoutingConfig = RoutingConfig()
    """How a token's experts are chosen."""
    expert_bias: bool = False
    """Biases on the router and on the projections of experts (gpt-oss)."""
    shared_expert_size: int = Field(default=0, ge=0, le=_MAX_SIZE)
    """Width of the shared expert, which every token goes to in addition to those that it chooses; 0 for none."""
    shared_expert_gate: bool = False
    """The shared expert's output is scaled by a gate computed from each token (Qwen3-Next, Qwen3.5)."""
    swiglu_limit: float | None = Field(default=None, gt=0)
    """Experts compute `(up + 1) * gate * sigmoid(swiglu_alpha * gate)`. This number bounds `gate` from above and `up`
    on both sides (gpt-oss). None for `silu(gate) * up`."""
    swiglu_alpha: float = Field(default=1.702, gt=0)
    dense_layers: tuple[int, ...] = ()
    """Layers with an MLP in a model with experts."""
    quantization: Quantization | None = None
    """How the checkpoint stores the weights of the layers' projections; None if they are not quantized."""

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}")
        for factors in (self.rope_scaling.short_factor, self.rope_scaling.long_factor) if self.rope_scaling else ():
            if factors is not None and len(factors) != self.rotary_size // 2:
                raise ValueError(f"longrope has {len(factors)} factors for {self.rotary_size // 2} pairs that turn")
        if self.rotary_size % 2 or self.head_size % 2:
            raise ValueError(f"head_dim {self.head_size} is odd, or what turns of it; rotary embedding needs pairs")
        if self.num_experts:
            if not self.expert_size:
                raise ValueError("expert_size is missing; a model with experts needs it")
            if self.num_experts_per_token > self.num_experts:
                raise ValueError(
                    f"num_experts_per_token {self.num_experts_per_token} is above num_experts {self.num_experts}"
                )
            self._check_groups()
        if self.window_layers and not all(0 <= layer < self.num_layers for layer in self.window_layers):
            raise ValueError(f"window_layers {self.window_layers} names a layer past num_layers {self.num_layers}")
        if self.delta is not None and not set(range(self.num_layers)).issuperset(self.delta.layers):
            raise ValueError(f"delta.layers {self.delta.layers} names a layer past num_layers {self.num_layers}")
        latent = self.latent
        if latent is not None and (self.kv_heads, self.head_size) != (1, latent.rank + latent.rope_dim):
            raise ValueError(f"latent attention has one key/value head of {latent.rank + latent.rope_dim} numbers")
        if not self.attention_layers:
            raise ValueError("delta.layers names every layer; at least one must have attention")
        return self

    def _check_groups(self) -> None:
        """Check that all groups of experts have the same size and hold enough experts."""
        groups, top_groups = self.routing.num_groups, self.routing.num_top_groups
        if self.num_experts % groups or top_groups > groups:
            raise ValueError(
                f"{self.num_experts} experts cannot be {groups} equal groups, of which {top_groups} are chosen"
            )
        size, per_token = self.num_experts // groups, self.num_experts_per_token
        if top_groups * size < per_token or (groups > 1 and self.routing.uses_sigmoid and size < 2):
            raise ValueError(f"{top_groups} groups of {size} experts are too few for {per_token} a token")

    @property
    def num_labels(self) -> int:
        """Number of labels that the model gives to texts; 0 for a model that generates tokens."""
        return 0 if self.classifier is None else self.classifier.num_labels

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def rotary_size(self) -> int:
        """How many numbers of a head RoPE rotates."""
        if self.latent is not None:
            return self.latent.rope_dim
        return int(self.head_size * self.partial_rotary_factor)

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def slot_width(self) -> int:
        """How many numbers a layer with attention keeps for each token."""
        return (2 if self.latent is None else 1) * self.kv_heads * self.head_size

    @property
    def mlp_size(self) -> int:
        """Width of the MLP."""
        return self.intermediate_size or -(-self.hidden_size * 8 // 3 // 64) * 64

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts instead of an MLP."""
        return self.num_experts > 0 and layer not in self.dense_layers

    def state_bytes(self, itemsize: int) -> int:
        """Bytes of one sequence's states in all layers without attention. Activations take `itemsize` bytes."""
        delta = self.delta
        if delta is None:
            return 0
        value_size = delta.num_value_heads * delta.value_dim
        tail = (delta.kernel_size - 1) * (2 * delta.num_key_heads * delta.key_dim + value_size)
        return len(delta.layers) * (tail * itemsize + 4 * value_size * delta.key_dim)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers with keys and values, or latents."""
        others = self.delta.layers if self.delta is not None else ()
        return tuple(layer for layer in range(self.num_layers) if layer not in others)

    def layer_window(self, layer: int) -> int | None:
        """Sliding window of one layer in tokens; None if it attends to everything."""
        return self.window_size if self.window_layers is None or layer in self.window_layers else None
