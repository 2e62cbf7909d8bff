"""Random PEFT adapters for a model, for benchmarks and tests."""

import json
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import save_file

from llm.checkpoint.adapter import adapted_places
from llm.config import ModelConfig
from llm.models.decoder import DecoderModel


def write_random_adapter(
    config: ModelConfig,
    directory: Path,
    *,
    rank: int,
    seed: int = 0,
    std: float = 0.02,
    targets: Collection[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write an adapter for a model of this shape, with both factors random, as PEFT saves one.

    Args:
        std: of the numbers of both factors.
        targets: last names of the modules that it is on; None for all that an adapter may be on.
    """
    model = DecoderModel.from_config(config, device="meta")
    generator = torch.Generator().manual_seed(seed)
    tensors, names = {}, set()
    for name, place in adapted_places(model).items():
        target = name.rpartition(".")[2]
        if targets is not None and target not in targets:
            continue
        names.add(target)
        linear = model.get_submodule(place.module)
        assert isinstance(linear, torch.nn.Linear), "adapters are on linear layers"
        num_rows = len(range(*place.rows.indices(linear.out_features)))
        for part, shape in (("A", (rank, linear.in_features)), ("B", (num_rows, rank))):
            numbers = torch.randn(shape, generator=generator) * std
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = numbers.to(dtype)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(names)}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
