"""Which weights of a checkpoint have fewer than 16 bits, and how its files store them."""

import re
from enum import StrEnum
from functools import cache

from pydantic import Field

from llm.config.strict_model import StrictModel


class WeightLayout(StrEnum):
    """How a checkpoint's files store the quantized weights of a projection."""

    FP8 = "fp8"
    """E4M3 in `weight`, scales in `weight_scale` or `weight_scale_inv`. compressed-tensors calls it float-quantized,
    transformers fp8."""
    PACKED = "pack-quantized"
    """compressed-tensors: 4 bits in `weight_packed`."""
    AWQ = "awq"
    """Lin et al. 2023 (arXiv:2306.00978): 4 bits in `qweight`, packed along the outputs."""
    GPTQ = "gptq"
    """Frantar et al. 2022 (arXiv:2210.17323): 4 bits in `qweight`, packed along the inputs."""
    MXFP4 = "mxfp4"
    """gpt-oss's experts: 4-bit floats with one scale for every 32, in tensors named `…_blocks` and `…_scales`."""


class WeightFormat(StrictModel):
    """How the weights of some projections are stored: `(code - zero) * scale`."""

    layout: WeightLayout
    targets: tuple[str, ...] = ("Linear",)
    """The projections it applies to: "Linear" for all, the end of a name, or "re:" and a pattern that matches the
    beginning of a name."""
    group_size: int | None = Field(default=None, gt=0)
    """How many inputs of an output share a scale; None for all."""
    block_rows: int | None = Field(default=None, gt=0)
    """fp8: how many outputs share the scale of a group of inputs in the file. None if each output has its own scale, or
    if one scale covers all."""
    has_zeros: bool = False
    """4 bits: each output and group has its own zero; otherwise the zero is 8."""
    zero_offset: int = Field(default=0, ge=0, le=1)
    """4 bits: number to add to each zero stored in the file."""
    has_order: bool = False
    """4 bits: `g_idx` says which group an input belongs to (GPTQ's act-order)."""

    @property
    def num_bits(self) -> int:
        """Bits of a code."""
        return 8 if self.layout is WeightLayout.FP8 else 4


class Quantization(StrictModel):
    """Which projections of a checkpoint are stored in fewer than 16 bits, and how."""

    formats: tuple[WeightFormat, ...]
    """The first format whose targets match a projection applies to it."""
    ignored: tuple[str, ...] = ()
    """Projections that are stored unquantized, named like targets; part of a dotted name is enough."""
    has_cache_scales: bool = False
    """The checkpoint may hold scales for 8-bit keys and values."""

    def format_of(self, name: str) -> WeightFormat | None:
        """The format of a projection, by its dotted name in the checkpoint; None for 16 or 32 bits."""
        if _name_in(self.ignored, name):
            return None
        matching = (f for f in self.formats if any(t == "Linear" or _names(t, name) for t in f.targets))
        return next(matching, None)


def _name_in(patterns: tuple[str, ...], name: str) -> bool:
    """Whether any of the patterns names a module. Plain names, of which there are many, take one lookup together."""
    literals, others = _split_patterns(patterns)
    parts = name.split(".")
    ends = range(1, len(parts) + 1)
    if any(".".join(parts[begin:end]) in literals for end in ends for begin in range(end)):
        return True
    return any(_names(pattern, name) for pattern in others)


@cache
def _split_patterns(patterns: tuple[str, ...]) -> tuple[frozenset[str], tuple[str, ...]]:
    """Plain names, as the text half has them, and regular expressions."""
    literals = (pattern.replace("language_model.", "") for pattern in patterns if not pattern.startswith("re:"))
    return frozenset(literals), tuple(pattern for pattern in patterns if pattern.startswith("re:"))


def _names(pattern: str, name: str) -> bool:
    """Whether a pattern of a quantized checkpoint names a module; in a multimodal checkpoint, one of the text half."""
    if pattern.startswith("re:"):
        in_text_half = name.replace("model.", "model.language_model.", 1)
        return any(re.match(pattern[3:], each) is not None for each in (name, in_text_half))
    return f".{pattern.replace('language_model.', '')}." in f".{name}."
