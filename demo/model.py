"""The demo model's shape, and how it is written to disk: transformers' Llama layout."""

import json
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from demo.tokenizer import BEGIN, END, PAD, SPECIAL_IDS, VOCAB_SIZE, write_tokenizer

CONTEXT_LENGTH = 2048
STORED_DTYPE = torch.bfloat16


def build_model() -> LlamaForCausalLM:
    """Return the model with random weights in float32: 4.5 million parameters, two query heads to a KV head."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL_IDS[BEGIN],
        eos_token_id=SPECIAL_IDS[END],
        pad_token_id=SPECIAL_IDS[PAD],
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def save_checkpoint(model: LlamaForCausalLM, folder: Path) -> None:
    """Write config, weights rounded to `STORED_DTYPE`, generation defaults and tokenizer. The model is rounded too."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to("cpu", STORED_DTYPE)
    model.generation_config = GenerationConfig(
        bos_token_id=SPECIAL_IDS[BEGIN],
        eos_token_id=SPECIAL_IDS[END],
        pad_token_id=SPECIAL_IDS[PAD],
        do_sample=False,
    )
    model.save_pretrained(folder)
    _name_rope_theta(folder / "config.json")
    write_tokenizer(folder, CONTEXT_LENGTH)


def _name_rope_theta(path: Path) -> None:
    """Add the key under which loaders older than transformers 5 look for the RoPE base."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.setdefault("rope_theta", 10000.0)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
