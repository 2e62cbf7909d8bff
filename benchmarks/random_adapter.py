"""Random PEFT adapters for a model, for benchmarks and tests."""

import json
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import save_file

from llm.checkpoint.adapter_places import adapted_places, shape_of
from llm.checkpoint.adapter_stacks import StackReader
from llm.config import ModelConfig
from llm.models.decoder import DecoderModel
from llm.models.experts import ROUTING
from llm.models.registry import destinations


def write_random_adapter(
    config: ModelConfig,
    directory: Path,
    *,
    rank: int,
    seed: int = 0,
    std: float = 0.02,
    targets: Collection[str] | None = None,
    dtype: torch.dtype = torch.float32,
    with_experts: bool = False,
) -> None:
    """Write an adapter for a model of this shape, with both factors random, as PEFT saves one.

    Args:
        std: of the numbers of both factors.
        targets: last names of the modules that it is on; None for all that an adapter may be on.
        with_experts: it may be on routers and on what these choose among, too.
    """
    model = DecoderModel.from_config(config, device="meta")
    shapes = {}
    for name, place in adapted_places(model).items():
        module, target = model.get_submodule(place.module), name.rpartition(".")[2]
        if (targets is None or target in targets) and (with_experts or not isinstance(module, ROUTING)):
            num_inputs, num_outputs = shape_of(module)
            num_rows = len(range(*place.rows.indices(num_outputs)))
            shapes[name] = (rank, num_inputs), (num_rows, rank)
    names = {name.rpartition(".")[2] for name in shapes}
    stacks = _stacks(config, rank) if with_experts and targets is None else {}
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"base_model.model.{name}.lora_{part}.weight": (torch.randn(shape, generator=generator) * std).to(dtype)
        for name, both in (shapes | stacks).items()
        for part, shape in zip("AB", both, strict=True)
    }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(names)}
    if stacks:
        settings["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
    (directory / "adapter_config.json").write_text(json.dumps(settings))


def _stacks(config: ModelConfig, rank: int) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """Shapes of A and B for all experts of a layer at once, in families whose checkpoints have them in no other way."""
    if any(place.expert is not None for place in destinations(config).values()):
        return {}
    ranks, size, shapes = rank * config.num_experts, config.expert_size, {}
    for name in StackReader(config).names:
        shapes[f"{name}.base_layer"] = (ranks, config.hidden_size), (2 * size, ranks)
        shapes[name] = (ranks, size), (config.hidden_size, ranks)
    return shapes
