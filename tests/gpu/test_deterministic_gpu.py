"""`deterministic: true` on a GPU: bit by bit the same, whatever runs beside a request and however it is cut up."""

import pytest
import torch
from known_shapes import SHAPES

from llm.config import EngineConfig
from llm.kernels.linear import Linear, Weights
from llm.kernels.quantization import quantize_weight
from llm.models.decoder import DecoderModel
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIGS = {"bf16": {}, "fp8": {"quantization": "fp8", "kv_cache_dtype": "fp8"}}


def generate(shape: dict, requests: list[GenerationRequest], **config) -> list[tuple[int, ...]]:
    torch.manual_seed(0)
    model = DecoderModel(
        vocab_size=32_000, num_layers=2, max_seq_len=4096, device="cuda", dtype=torch.bfloat16, **shape
    )
    defaults = {"max_batch_size": 256, "max_seq_len": 2048, "num_pages": 4000, "deterministic": True}
    engine = ContinuousBatchingEngine(model, config=EngineConfig(**{**defaults, **config}))
    results = engine.generate(requests, progress=False)
    engine.scheduler.check()
    return [result.token_ids for result in results]


def create_requests(num: int, num_tokens: int) -> list[GenerationRequest]:
    """Greedy ones and sampled ones by turns, with prompts from one token to several chunks."""
    generator = torch.Generator().manual_seed(1)
    lens = [1, 2, 17, 64, 65, 200, 700, 1500]
    return [
        GenerationRequest(
            prompt_token_ids=tuple(torch.randint(0, 32_000, (lens[i % 8] + i // 8,), generator=generator).tolist()),
            max_new_tokens=num_tokens, temperature=float(i % 2), seed=i, ignore_eos=True,
        )
        for i in range(num)
    ]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    "shape",
    [
        "llama-3.1-8b",
        "qwen3-0.6b",
        "mistral with a window",
        "qwen3-30b-a3b",
        "gemma-2-9b with lower caps",
        "gemma-3-4b",
        "qwen3.5",
        "deepseek-v3, narrow",
    ],
)
def test_tokens_do_not_depend_on_the_batch(shape, config):
    """Together, few at a time, one at a time, in chunks, and through a pool so small that sequences are preempted."""
    if SHAPES[shape].get("latent") is not None:  # whose cache is not rounded to 8 bits
        config = {name: value for name, value in config.items() if name != "kv_cache_dtype"}
    requests = create_requests(96, 24)
    together = generate(SHAPES[shape], requests, **config)
    assert generate(SHAPES[shape], requests, max_batch_size=5, **config) == together
    assert generate(SHAPES[shape], requests[:16], max_batch_size=1, **config) == together[:16]
    assert generate(SHAPES[shape], requests, max_tokens_per_step=300, **config) == together
    assert generate(SHAPES[shape], requests, num_pages=220, enable_prefix_caching=False, **config) == together


@pytest.mark.parametrize("is_quantized", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    ("num_outputs", "num_inputs"),
    [(6144, 4096), (4096, 4096), (28_672, 4096), (4096, 14_336), (128_256, 4096), (4096, 1024), (1024, 3072)],
)
def test_rows_of_large_products_do_not_depend_on_each_other(num_outputs, num_inputs, is_quantized):
    """Tiles of every width add up one output alike: the rule that `llm.kernels.linear` rests on."""
    torch.manual_seed(0)
    x = torch.randn(700, num_inputs, device="cuda").bfloat16()
    weight, scales = torch.randn(num_outputs, num_inputs, device="cuda").bfloat16(), None
    if is_quantized:
        weight, scales = quantize_weight(weight)
    linear, weights = Linear(torch.device("cuda"), deterministic=True), Weights(weight, None, scales)
    whole = linear(x, weights)
    exact = x.double() @ (weight.double() * (1 if scales is None else scales[:, None])).t()
    assert (whole.double() - exact).norm() / exact.norm() < 5e-3
    for size in (1, 2, 8, 16, 17, 33, 64, 65, 128, 200, 256, 400):
        for first in (0, 129):
            alone = linear(x[first : first + size].contiguous(), weights)
            assert torch.equal(alone, whole[first : first + size]), f"{size} rows from {first}"
