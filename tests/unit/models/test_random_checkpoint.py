"""Checkpoints of known shapes with random weights, which benchmarks serve, are ones that load."""

import json

import pytest
import torch
from quantized_layouts import awq, fp8_by_block, gptq
from test_mxfp4 import QUANTIZATION

from benchmarks.random_checkpoint import write_weights
from llm.checkpoint.loading import load_decoder

KINDS = {
    "llama": ("llama", {}, None),
    "experts": ("qwen3_moe", {}, None),
    "experts in 4 bits": ("qwen3_moe", {"moe_intermediate_size": 64}, awq().config),
    "experts in an order of their inputs": ("mixtral", {}, gptq(has_order=True).config),
    "experts in 8 bits": ("mixtral", {}, fp8_by_block().config),
    "experts in a stack": ("gpt_oss", {}, None),
    "experts in a stack, in 4 bits": ("gpt_oss", {}, QUANTIZATION),
}


@pytest.mark.parametrize("name", KINDS)
@torch.inference_mode()
def test_a_random_checkpoint_loads(checkpoints, tmp_path, name):
    """By its configuration alone, in the format that this says; and its logits are numbers."""
    kind, changes, quantization = KINDS[name]
    config = json.loads((checkpoints(kind, **changes)[0] / "config.json").read_text())
    if quantization is not None:
        config["quantization_config"] = quantization
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_weights(tmp_path, torch.float32, "cpu")
    logits = load_decoder(tmp_path, progress=False)(torch.arange(3, 20))
    assert logits.isfinite().all()
    assert 0.001 < logits.std() < 10
