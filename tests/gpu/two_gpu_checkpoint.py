"""A small random checkpoint, and engines of it on one GPU and on two."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from llm.config import EngineConfig
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 8001,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def write_checkpoint(directory: Path) -> Path:
    """Weights so large that the likeliest token depends on all of the context."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(0)
    hidden, mlp, key_value = CONFIG["hidden_size"], CONFIG["intermediate_size"], 4 * 64
    shapes = {"model.embed_tokens": (8001, hidden), "lm_head": (8001, hidden)}
    norms = ["model.norm"]
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        norms += [f"{prefix}.input_layernorm", f"{prefix}.post_attention_layernorm"]
        shapes |= {f"{prefix}.self_attn.{name}_proj": (hidden, hidden) for name in "qo"}
        shapes |= {f"{prefix}.self_attn.{name}_proj": (key_value, hidden) for name in "kv"}
        shapes |= {f"{prefix}.mlp.{name}_proj": (mlp, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj"] = (hidden, mlp)
    tensors = {f"{name}.weight": 0.06 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors |= {f"{name}.weight": torch.ones(hidden) for name in norms}
    save_file(tensors, directory / "model.safetensors")
    return directory


def make_engine(
    directory: Path, num_gpus: int, dtype: torch.dtype = torch.float32, **config
) -> ContinuousBatchingEngine:
    defaults = {"max_batch_size": 16, "max_seq_len": 1024, "max_tokens_per_step": 512, "num_pages": 1200}
    config = EngineConfig(**{**defaults, "tensor_parallel_size": num_gpus, **config})
    return ContinuousBatchingEngine.from_pretrained(
        directory, config=config, device="cuda", dtype=dtype, with_tokenizer=False, progress=False
    )


def create_requests(num: int = 12, **params) -> list[GenerationRequest]:
    """Prompts of one token to more than a step holds."""
    generator = torch.Generator().manual_seed(1)
    defaults = {"max_new_tokens": 24, "temperature": 0.0, "seed": 3, "ignore_eos": True}
    lens = [1 + 61 * i for i in range(num)]
    return [
        GenerationRequest(
            prompt_token_ids=tuple(torch.randint(0, 8000, (n,), generator=generator).tolist()), **{**defaults, **params}
        )
        for n in lens
    ]
