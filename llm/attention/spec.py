"""`AttentionSpec`: what one layer's attention has to know beside its queries, keys and values."""

from dataclasses import dataclass

from llm.attention.rope import RotaryEmbedding


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Shape, reach and scores of one layer's attention.

    Grouped queries (Ainslie et al. 2023, arXiv:2305.13245): each key/value head serves `num_heads / num_kv_heads`
    query heads.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: width of a head.
        rope: how positions turn queries and keys.
        window: a token attends to itself and the `window - 1` tokens before it; None for all.
        scale: of products of queries and keys, which makes them scores; None for `head_dim ** -0.5`.
        soft_cap: scores become `soft_cap * tanh(score / soft_cap)` (Gemma 2, arXiv:2408.00118); None for as they are.
        has_sinks: each query head has a score of its own beside those of the tokens, for nothing: it takes its share of
            the softmax and gives no value (gpt-oss; Xiao et al. 2023, arXiv:2309.17453).
        has_gate: behind each head's query comes a gate of its width, whose sigmoid scales the head's output.
        value_dim: values are the first so many numbers of keys, and keys alone are kept (latent attention, see
            `llm.models.latent`); None for values of their own.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RotaryEmbedding
    window: int | None = None
    scale: float | None = None
    soft_cap: float | None = None
    has_sinks: bool = False
    has_gate: bool = False
    value_dim: int | None = None

    @property
    def softmax_scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def is_plain(self) -> bool:
        """Whether it is softmax(scale QKᵀ) V and nothing else."""
        return self.soft_cap is None and not self.has_sinks

    @property
    def qkv_size(self) -> int:
        """Width of a token's queries, keys and values together, in this order; each query with its gate, if any."""
        return (self.num_query_parts * self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def num_query_parts(self) -> int:
        """What each head has in front of the keys: a query, or a query and a gate."""
        return 2 if self.has_gate else 1

    @property
    def has_values(self) -> bool:
        """Whether values are kept beside keys."""
        return self.value_dim is None

    @property
    def value_size(self) -> int:
        """Width of a head's value."""
        return self.value_dim or self.head_dim

    @property
    def output_size(self) -> int:
        """Width of what attention gives for a token."""
        return self.num_heads * self.value_size
