"""`AttentionSpec`: what one layer's attention has to know beside its queries, keys and values."""

from dataclasses import dataclass

from llm.attention.rope import RotaryEmbedding


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Shape and reach of one layer's attention. The softmax scale is `head_dim ** -0.5`.

    Grouped queries (Ainslie et al. 2023, arXiv:2305.13245): each key/value head serves `num_heads / num_kv_heads`
    query heads.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: width of a head.
        rope: how positions turn queries and keys.
        window: a token attends to itself and the `window - 1` tokens before it; None for all.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RotaryEmbedding
    window: int | None = None

    @property
    def qkv_size(self) -> int:
        """Width of a token's queries, keys and values together, in this order."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def output_size(self) -> int:
        """Width of what attention gives for a token."""
        return self.num_heads * self.head_dim
