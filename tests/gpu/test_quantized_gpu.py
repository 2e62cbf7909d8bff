"""Weights in groups on a GPU, in whole engines: as the torch operations with the same weights."""

import pytest
import torch
from first_logprobs import logprobs
from known_shapes import SHAPES

from llm.config import ModelConfig, Quantization, WeightFormat, WeightLayout
from llm.models.decoder import DecoderModel
from llm.models.quantized import quantized_modules

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FORMATS = {
    "awq": WeightFormat(layout=WeightLayout.AWQ, group_size=128, has_zeros=True),
    "gptq act-order, 32": WeightFormat(layout=WeightLayout.GPTQ, group_size=32, has_zeros=True, has_order=True),
    "packed, one group": WeightFormat(layout=WeightLayout.PACKED),
    "fp8 blocks": WeightFormat(layout=WeightLayout.FP8, group_size=128, block_rows=128),
    "fp8 by channel": WeightFormat(layout=WeightLayout.FP8),
}


def create_model(shape: dict, weight_format: WeightFormat) -> DecoderModel:
    """Random codes, scales, zeros and orders."""
    torch.manual_seed(0)
    quantization = Quantization(formats=(weight_format,), ignored=("lm_head",))
    config = ModelConfig(vocab_size=4000, num_layers=2, max_seq_len=4096, quantization=quantization, **shape)
    model = DecoderModel.from_config(config, device="cuda", dtype=torch.bfloat16)
    for _, module in quantized_modules(model):
        module.scales.data = module.scales.data * (0.5 + torch.rand(module.scales.shape, device="cuda")).to(
            module.scales
        )
        if module.order is not None:
            module.order.data = torch.rand(module.order.shape, device="cuda").argsort(-1).int()
    return model


@pytest.mark.parametrize("lens", [[1, 2, 16, 30], [300, 700, 1500]], ids=["few rows", "many rows"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", ["llama-3.1-8b", "qwen3-0.6b", "qwen2.5-14b", "qwen3-30b-a3b"])
def test_kernels_equal_the_torch_operations(shape, name, lens):
    """Codes are widened, never rounded again. FP8 by channel rounds the rows to 8 bits, so it is near on average."""
    model = create_model(SHAPES[shape], FORMATS[name])
    ours = logprobs(model, lens)
    expected = logprobs(model, lens, "reference")
    if name == "fp8 by channel":
        assert (ours - expected).abs().mean() < 0.2
    else:
        torch.testing.assert_close(ours, expected, rtol=0, atol=0.08)


@pytest.mark.parametrize("name", ["awq", "fp8 blocks"])
def test_deterministic(name):
    """Alone and together, bit by bit."""
    model = create_model(SHAPES["qwen3-0.6b"], FORMATS[name])
    together = logprobs(model, [5, 40, 300], deterministic=True)
    alone = torch.cat([logprobs(model, [5, 40, 300][:n], deterministic=True)[-1:] for n in (1, 2, 3)])
    assert torch.equal(together, alone)
