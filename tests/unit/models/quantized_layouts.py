"""Writes small checkpoints in the layouts of quantized weights, by what their tools have published.

AutoAWQ (`WQLinear_GEMM`), AutoGPTQ and GPTQModel (`QuantLinear`, checkpoint formats gptq and gptq_v2),
compressed-tensors (`pack_to_int32`, float-quantized, pack-quantized), transformers (`FineGrainedFP8Config`,
`FbgemmFp8Config`), ModelOpt (`export_hf_checkpoint`).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FP8 = torch.float8_e4m3fn
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]

Tensors = dict[str, torch.Tensor]
Write = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
"""Makes of a weight (out, in) the tensors that stand for it, and the weight that they mean."""


@dataclass(frozen=True)
class Layout:
    """A `quantization_config`, and what writes the weights that it describes."""

    config: dict[str, Any]
    write: Write


def pack_int32(codes: torch.Tensor) -> torch.Tensor:
    """Eight codes an int32 along the last dimension, the first in the lowest bits."""
    wide = (codes.long().unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(wide < 2**31, wide, wide - 2**32).int()


def round_to_4_bits(
    weight: torch.Tensor, size: int, *, has_zeros: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (out, in), zeros and scales (out, groups), and the weight that they mean."""
    groups = weight.unflatten(1, (-1, size))
    least, most = groups.amin(-1), groups.amax(-1)
    if has_zeros:
        scales = ((most - least) / 15).half()
        zeros = (-least / scales).round().clamp(1, 15)
    else:
        scales = (groups.abs().amax(-1) / 7.5).half()
        zeros = torch.full_like(scales, 8)
    codes = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15)
    meant = (codes - zeros.float()[..., None]) * scales.float()[..., None]
    return codes.flatten(1), zeros, scales, meant.flatten(1)


def awq(size: int = 32, **changes: Any) -> Layout:
    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        codes, zeros, scales, meant = round_to_4_bits(weight, size, has_zeros=True)

        def packed(rows: torch.Tensor) -> torch.Tensor:
            return pack_int32(rows.t().unflatten(1, (-1, 8))[..., _AWQ_ORDER].flatten(1))

        return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales.t()}, meant

    config = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}
    return Layout({**config, "modules_to_not_convert": None, **changes}, write)


def gptq(size: int = 32, *, has_zeros: bool = True, has_order: bool = False, is_v2: bool = False) -> Layout:
    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        num_inputs = weight.shape[1]
        group = num_inputs if size == -1 else size
        generator = torch.Generator().manual_seed(num_inputs)  # alike for what has the same inputs
        order = torch.randperm(num_inputs, generator=generator) if has_order else torch.arange(num_inputs)
        codes, zeros, scales, meant = round_to_4_bits(weight[:, order], group, has_zeros=has_zeros)
        back = order.argsort()
        tensors = {
            "qweight": pack_int32(codes[:, back]).t(), "scales": scales.t(),
            "qzeros": pack_int32(zeros.t() - (0 if is_v2 else 1)), "g_idx": back.int() // group,
        }  # fmt: skip
        return tensors, meant[:, back]

    config = {"quant_method": "gptq", "bits": 4, "group_size": size, "desc_act": has_order, "sym": not has_zeros}
    more = {"lm_head": False, "damp_percent": 0.1, "checkpoint_format": "gptq_v2" if is_v2 else "gptq"}
    return Layout({**config, **more}, write)


def compressed(weights: dict[str, Any], write: Write, **changes: Any) -> Layout:
    """compressed-tensors of one group of projections."""
    is_fp8 = weights["type"] == "float"
    group = {"targets": ["Linear"], "weights": {"dynamic": False, **weights}, "output_activations": None}
    group["input_activations"] = changes.pop("input_activations", None)
    config = {
        "quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"],
        "format": "float-quantized" if is_fp8 else "pack-quantized", "kv_cache_scheme": None,
        "quantization_status": "compressed", "global_compression_ratio": 1.9,
    }  # fmt: skip
    return Layout({**config, **changes}, write)


def packed(size: int = 32, *, has_zeros: bool = False, has_order: bool = False) -> Layout:
    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        num_inputs = weight.shape[1]
        order = torch.arange(num_inputs).flip(0) if has_order else torch.arange(num_inputs)
        codes, zeros, scales, meant = round_to_4_bits(weight[:, order], size, has_zeros=has_zeros)
        back = order.argsort()
        tensors = {
            "weight_packed": pack_int32(codes[:, back]), "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }  # fmt: skip
        if has_zeros:
            tensors["weight_zero_point"] = pack_int32(zeros.t()).t()
        if has_order:
            tensors["weight_g_idx"] = back.int() // size
        return tensors, meant[:, back]

    weights = {"num_bits": 4, "type": "int", "symmetric": not has_zeros, "strategy": "group", "group_size": size}
    return compressed({**weights, "actorder": "group" if has_order else None}, write)


def by_scale(weight: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 and what it means, by scales that broadcast to the weight."""
    codes = (weight / scales).to(FP8)
    return codes, codes.float() * scales


def fp8_by_channel() -> Layout:
    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        scales = weight.abs().amax(1, keepdim=True) / 448
        codes, meant = by_scale(weight, scales)
        return {"weight": codes, "weight_scale": scales}, meant

    activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    return compressed(weights, write, input_activations=activations)


def fp8_by_tensor(*, has_static_activations: bool = False, **changes: Any) -> Layout:
    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        scale = weight.abs().max() / 448
        codes, meant = by_scale(weight, scale)
        static = {"input_scale": torch.tensor([0.05])} if has_static_activations else {}
        return {"weight": codes, "weight_scale": scale.reshape(1), **static}, meant

    activations = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": not has_static_activations}
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    return compressed(weights, write, input_activations=activations, **changes)


def transformers_fp8_by_tensor() -> Layout:
    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        scale = weight.abs().max() / 448
        codes, meant = by_scale(weight, scale)
        return {"weight": codes, "weight_scale_inv": scale, "activation_scale": torch.tensor(0.05)}, meant

    config = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    return Layout({**config, "modules_to_not_convert": ["lm_head"]}, write)


def fp8_by_block(rows: int = 32, columns: int = 32, *, is_compressed: bool = False) -> Layout:
    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        num_outputs, num_inputs = weight.shape
        shape = -(-num_outputs // rows), -(-num_inputs // columns)
        scales = torch.rand(shape) / 100 + 1e-3
        spread = scales.repeat_interleave(rows, 0)[:num_outputs].repeat_interleave(columns, 1)[:, :num_inputs]
        codes, meant = by_scale(weight, spread)
        return {"weight": codes, "weight_scale" if is_compressed else "weight_scale_inv": scales}, meant

    if is_compressed:
        weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [rows, columns]}
        return compressed(weights, write)
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    return Layout({**config, "weight_block_size": [rows, columns]}, write)


def fbgemm() -> Layout:
    config = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    return Layout(config, fp8_by_channel().write)


def modelopt(algorithm: str, **changes: Any) -> Layout:
    """In config.json, as newer versions write it."""

    def write_blocks(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        tensors, meant = fp8_by_block(128, 128, is_compressed=True).write(weight)
        return {**tensors, "weight_scale": tensors["weight_scale"][:, None, :, None]}, meant

    write = {
        "FP8": fp8_by_tensor(has_static_activations=True).write,
        "FP8_PER_CHANNEL_PER_TOKEN": fp8_by_channel().write,
        "FP8_PB_WO": write_blocks,
    }[algorithm]
    config = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head", "model.layers.*.mlp.gate"]}
    return Layout({**config, "producer": {"name": "modelopt", "version": "0.37.0"}, **changes}, write)


def is_projection(name: str) -> bool:
    """Whether a tensor is the weight of a layer's projection."""
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def quantize_directory(
    source: Path, directory: Path, layout: Layout, is_quantized: Callable[[str], bool] = is_projection
) -> Tensors:
    """Write a checkpoint of transformers' again in a layout; gives the weights that it means, by their plain names."""
    return rewrite(source, directory, layout.config, lambda name: layout.write if is_quantized(name) else None)


def rewrite(source: Path, directory: Path, config: dict[str, Any], write_of: Callable[[str], Write | None]) -> Tensors:
    """The same with a way to write each tensor, by its name; None for as it is."""
    directory.mkdir(exist_ok=True)
    written: Tensors = {}
    meant: Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        write = write_of(name)
        if write is None:
            written[name] = meant[name] = tensor
        else:
            tensors, meant[name] = write(tensor)
            written |= {name.removesuffix("weight") + leaf: tensor for leaf, tensor in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in written.items()}, directory / "model.safetensors")
    content = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**content, "quantization_config": config}))
    return meant


def all_layouts() -> Iterator[tuple[str, Layout]]:
    """Every layout that can be loaded, with a name."""
    for size in (32, 16):
        yield f"awq {size}", awq(size)
    for size in (32, -1):
        for name, options in {
            "": {}, " symmetric": {"has_zeros": False}, " act-order": {"has_order": True}, " v2": {"is_v2": True}
        }.items():  # fmt: skip
            yield f"gptq {size}{name}", gptq(size, **options)
    yield "packed", packed()
    yield "packed asymmetric", packed(has_zeros=True)
    yield "packed act-order", packed(has_zeros=True, has_order=True)
    yield "fp8 by channel", fp8_by_channel()
    yield "fp8 by tensor", fp8_by_tensor()
    yield "fp8 by tensor, static", fp8_by_tensor(has_static_activations=True)
    yield "transformers' fp8 by tensor", transformers_fp8_by_tensor()
    yield "transformers' fp8 by block", fp8_by_block()
    yield "fp8 by block, partial", fp8_by_block(128, 128)
    yield "fp8 by block", fp8_by_block(is_compressed=True)
    yield "fbgemm", fbgemm()
    for algorithm in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO"):
        yield f"modelopt {algorithm}", modelopt(algorithm)
