"""Rotary position embedding, and how its angles are stretched past the trained context."""

import math

import torch

from llm.config import RopeScaling, RopeScalingType


class RotaryEmbedding:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves rotated as Hugging Face does.

    The table of angles is float32 and made on first use on the device asked for, so that a model built on the meta
    device, or moved, needs no care. It has `max_seq_len` positions, or as many as an engine serves: see `fit_context`.

    Args:
        dim: leading numbers of a head that turn; even. The others stay as they are (GPT-J's partial rotary embedding).
        max_seq_len: the model's context in tokens.
        theta: base of the angles.
        scaling: how the angles are stretched; None for not at all.
    """

    def __init__(self, dim: int, max_seq_len: int, theta: float, scaling: RopeScaling | None = None) -> None:
        self.dim = dim
        self.max_seq_len = max_seq_len
        self._theta, self._scaling = theta, scaling
        self._context_len = max_seq_len
        self._num_positions: int | None = None
        self._table: torch.Tensor | None = None
        self._query_scales: torch.Tensor | None = None

    def fit_context(self, context_len: int) -> None:
        """Choose the angles for sequences of at most this many tokens, and need no table of more positions.

        LongRoPE has two sets of angles. Which counts must not change while a sequence's keys are kept, so it goes by
        the longest sequence that there may be, not by the sequence. The table keeps the positions that an earlier call
        asked for: several engines may share a model.
        """
        num_positions = max(context_len, self._num_positions or 0)
        if (context_len, num_positions) != (self._context_len, self._num_positions):
            self._context_len, self._num_positions = context_len, num_positions
            self._table = self._query_scales = None

    def reach(self, end: int) -> None:
        """Have a table with the positions before `end`, whatever context the angles are for."""
        if self._num_positions is not None and end > self._num_positions:
            self._num_positions = self.max_seq_len
            self._table = self._query_scales = None

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of `positions` (…) int64: two tensors (…, 1, dim / 2), to broadcast over heads."""
        cos, sin = self.table(positions.device)[:, positions].unsqueeze(-2)
        return cos, sin

    def query_scales(self, device: torch.device) -> torch.Tensor | None:
        """What the queries of each position are multiplied by, (positions,) float32; None for nothing."""
        scaling = self._scaling
        if scaling is None or not scaling.llama_4_scaling_beta:
            return None
        if self._query_scales is None or self._query_scales.device != device:
            original_len = scaling.original_max_position_embeddings or self.max_seq_len
            with torch.device("cpu"):
                rounds = torch.arange(self._num_positions or self.max_seq_len) // original_len
                self._query_scales = (1 + scaling.llama_4_scaling_beta * torch.log(1 + rounds.float())).to(device)
        return self._query_scales

    def table(self, device: torch.device) -> torch.Tensor:
        """Cosines, then sines, of every position: (2, positions, dim / 2) float32."""
        if self._table is None or self._table.device != device:
            with torch.device("cpu"):
                frequencies, scale = rope_frequencies(
                    self.dim, self._theta, self._scaling, self.max_seq_len, self._context_len
                )
                positions = torch.arange(self._num_positions or self.max_seq_len, dtype=torch.float32)
                angles = torch.outer(positions, frequencies)
            self._table = (torch.stack([angles.cos(), angles.sin()]) * scale).to(device)
        return self._table


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn heads (…, heads, head_dim) by the angles of their positions; in float32, returned in x's dtype."""
    num_pairs = cos.shape[-1]
    first, second, rest = x.tensor_split((num_pairs, 2 * num_pairs), dim=-1)
    return torch.cat([(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype), rest], dim=-1)


def rope_frequencies(
    dim: int, theta: float, scaling: RopeScaling | None, max_seq_len: int, context_len: int
) -> tuple[torch.Tensor, float]:
    """Angle a token turns per dimension pair, (dim / 2,) float32, and the factor on cos and sin.

    Args:
        max_seq_len: the model's.
        context_len: longest sequence that there may be.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if scaling is None:
        return frequencies, 1.0
    original_len = scaling.original_max_position_embeddings or max_seq_len
    match scaling.rope_type:
        case RopeScalingType.LINEAR:
            return frequencies / scaling.factor, 1.0
        case RopeScalingType.LLAMA3:
            return _llama3_frequencies(frequencies, scaling, original_len), 1.0
        case RopeScalingType.YARN:
            return _yarn_frequencies(frequencies, theta, scaling, original_len), _yarn_attention_factor(scaling)
        case RopeScalingType.LONGROPE:
            factors = scaling.long_factor if context_len > original_len else scaling.short_factor
            return frequencies / torch.tensor(factors), _longrope_attention_factor(scaling, original_len)


def _longrope_attention_factor(scaling: RopeScaling, original_len: int) -> float:
    """Temperature of the attention logits, as a factor on cos and sin (LongRoPE's code; the same for both sets)."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return math.sqrt(1 + math.log(scaling.factor) / math.log(original_len)) if scaling.factor > 1 else 1.0


def _llama3_frequencies(frequencies: torch.Tensor, scaling: RopeScaling, original_len: int) -> torch.Tensor:
    """Long wavelengths divided by `factor`, short ones kept, a smooth blend between."""
    rotations = original_len * frequencies / (2 * math.pi)
    keep = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def _yarn_frequencies(frequencies: torch.Tensor, theta: float, scaling: RopeScaling, original_len: int) -> torch.Tensor:
    """Interpolate slow dimensions, keep fast ones, blend linearly between (YaRN, section 3.2)."""
    num_pairs = len(frequencies)

    def pair_with_rotations(rotations: float) -> float:
        return num_pairs * math.log(original_len / (rotations * 2 * math.pi)) / math.log(theta)

    low, high = pair_with_rotations(scaling.beta_fast), pair_with_rotations(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * num_pairs - 1)
    ramp = (torch.arange(num_pairs, dtype=torch.float32) - low) / max(high - low, 0.001)
    interpolate = ramp.clamp(0, 1)
    return interpolate * frequencies / scaling.factor + (1 - interpolate) * frequencies


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    """Temperature of the attention logits, as a factor on cos and sin (YaRN, section 3.4)."""

    def factor_for(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return scaling.attn_factor * factor_for(scaling.mscale) / factor_for(scaling.mscale_all_dim)
    return scaling.attn_factor * factor_for(1.0)
