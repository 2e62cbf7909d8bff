"""Small random PEFT adapters for the demo model."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, MLP, NUM_LAYERS = 256, 704, 6
_SHAPES = {
    "self_attn.q_proj": (HIDDEN, 256), "self_attn.k_proj": (HIDDEN, 128), "self_attn.v_proj": (HIDDEN, 128),
    "self_attn.o_proj": (256, HIDDEN), "mlp.gate_proj": (HIDDEN, MLP), "mlp.up_proj": (HIDDEN, MLP),
    "mlp.down_proj": (MLP, HIDDEN),
}  # fmt: skip


def write_adapter(directory: Path, seed: int = 0, rank: int = 4, **config: Any) -> Path:
    """Write a random adapter on every projection of the demo model, as PEFT saves it; returns its directory.

    The configuration comes last, as with PEFT.
    """
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, torch.Tensor] = {}
    for layer in range(NUM_LAYERS):
        for module, (num_in, num_out) in _SHAPES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            factors[f"{name}.lora_A.weight"] = 0.1 * torch.randn(rank, num_in, generator=generator)
            factors[f"{name}.lora_B.weight"] = 0.1 * torch.randn(num_out, rank, generator=generator)
    save_file(factors, directory / "adapter_model.safetensors")
    targets = [module.rpartition(".")[2] for module in _SHAPES]
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, **config}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return directory
