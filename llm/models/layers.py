"""Layers without a memory: normalisation, rotary embedding, MLP."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from llm.config import ModelConfig, RopeScaling, RopeScalingType


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension; computed in float32, scaled in x's dtype, as Hugging Face does."""
        # Spelled out: on a CPU F.rms_norm takes three times as long for a single token.
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class MLP(nn.Module):
    """SwiGLU feed-forward (Shazeer 2020, arXiv:2002.05202). Gate and up share one product: rows gate, then up."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.mlp_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.mlp_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, hidden_size) → (…, hidden_size)."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        down: torch.Tensor = self.down_proj(F.silu(gate) * up)
        return down


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves rotated as Hugging Face does.

    The table of angles is float32 and made on first use on the device asked for, so that a model built on the meta
    device, or moved, needs no care.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.max_seq_len = config.max_seq_len
        self._inverse_frequencies, self._scale = rope_frequencies(
            config.head_size, config.rope_theta, config.rope_scaling, config.max_seq_len
        )
        self._table: torch.Tensor | None = None

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of `positions` (…) int64: two tensors (…, 1, head_dim / 2), to broadcast over heads."""
        cos, sin = self.table(positions.device)[:, positions].unsqueeze(-2)
        return cos, sin

    def table(self, device: torch.device) -> torch.Tensor:
        """Cosines, then sines, of every position: (2, max_seq_len, head_dim / 2) float32."""
        if self._table is None or self._table.device != device:
            angles = torch.outer(torch.arange(self.max_seq_len, dtype=torch.float32), self._inverse_frequencies)
            self._table = (torch.stack([angles.cos(), angles.sin()]) * self._scale).to(device)
        return self._table


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `x` (…, heads, head_dim) by the angles of its positions; computed in float32, returned in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None, max_seq_len: int
) -> tuple[torch.Tensor, float]:
    """Angle a token turns per dimension pair, (head_dim / 2,) float32, and the factor on cos and sin."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
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
        return factor_for(scaling.mscale) / factor_for(scaling.mscale_all_dim)
    return factor_for(1.0)
