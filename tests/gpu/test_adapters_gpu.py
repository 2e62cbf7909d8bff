"""Adapters by request on a GPU, in whole engines: as models with the adapter merged."""

import copy
from pathlib import Path

import pytest
import torch
from known_shapes import SHAPES

from benchmarks.random_adapter import write_random_adapter
from llm.checkpoint.adapter import load_lora
from llm.checkpoint.adapter_digest import adapter_digest
from llm.config import EngineConfig
from llm.models.decoder import DecoderModel
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import AdapterRef, GenerationRequest

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

RANKS = 1, 4, 8, 16, 16, 32, 16, 8


def create_engine(model: DecoderModel, **config) -> ContinuousBatchingEngine:
    defaults = {"max_batch_size": 16, "max_seq_len": 2048, "num_pages": 1200, "max_tokens_per_step": 2048}
    return ContinuousBatchingEngine(model, config=EngineConfig(**{**defaults, **config}))


def requests_of(lens: list[int], adapters: list[AdapterRef | None]) -> list[GenerationRequest]:
    """After a prompt of each length and one token of output: the first by prefill, the next by decode."""
    generator = torch.Generator().manual_seed(1)
    return [
        GenerationRequest(
            prompt_token_ids=tuple(torch.randint(0, 4000, (n,), generator=generator).tolist()), output_token_ids=(7,),
            max_new_tokens=3, temperature=0.0, ignore_eos=True, logprobs=0, allowed_token_ids=(11,), adapter=adapter,
        )
        for n, adapter in zip(lens, adapters, strict=True)
    ]  # fmt: skip


def logprobs(engine: ContinuousBatchingEngine, requests: list[GenerationRequest]) -> torch.Tensor:
    """Of a token that every model is made to draw twice."""
    results = engine.generate(requests, progress=False)
    assert {result.error for result in results} == {None}
    return torch.tensor([[entry.logprob for entry in result.logprobs] for result in results])


def write_adapters(model: DecoderModel, directory: Path, *, with_experts: bool = False) -> list[AdapterRef]:
    for i, rank in enumerate(RANKS):
        std = 0.05 / rank**0.25
        write_random_adapter(model.config, directory / str(i), rank=rank, seed=i, std=std, with_experts=with_experts)
    paths = [directory / str(i) for i in range(len(RANKS))]
    return [AdapterRef(name=path.name, path=str(path), digest=adapter_digest(path)) for path in paths]


def of_merged_models(model: DecoderModel, requests: list[GenerationRequest]) -> torch.Tensor:
    """What `logprobs` gives of each request alone, by the reference, with a model that its adapter is merged into."""
    expected = []
    for request in requests:
        merged = copy.deepcopy(model)
        if request.adapter is not None:
            load_lora(merged, request.adapter.path)
            merged.merge_lora()
        alone = create_engine(merged, attention_backend="reference")
        expected.append(logprobs(alone, [request.model_copy(update={"adapter": None})])[0])
    return torch.stack(expected)


@pytest.mark.parametrize(
    ("lens", "config"),
    [([1, 2, 16, 30, 5, 9, 40, 3, 8, 12], {}), ([300, 700, 150, 40, 5, 900, 1, 64, 500, 256], {"quantization": "fp8"})],
    ids=["few rows", "many rows in fp8"],
)
@pytest.mark.parametrize("shape", ["llama-3.1-8b", "qwen3-30b-a3b"])
def test_eight_adapters_equal_their_merged_models(tmp_path, shape, lens, config):
    """In bfloat16; rows without an adapter beside them."""
    torch.manual_seed(0)
    model = DecoderModel(vocab_size=4000, num_layers=2, max_seq_len=4096, device="cuda", dtype=torch.bfloat16,
                         **SHAPES[shape])  # fmt: skip
    adapters = [*write_adapters(model, tmp_path), None, None]
    requests = requests_of(lens, adapters)
    expected = of_merged_models(model, requests)
    engine = create_engine(model, max_adapters=8, max_adapter_rank=32, **config)
    found = logprobs(engine, requests)
    base = logprobs(engine, [request.model_copy(update={"adapter": None}) for request in requests])
    differences = (found - expected).abs()
    if config:  # activations of many rows are rounded to 8 bits
        assert differences.mean() < 0.35
    else:
        assert differences.max() < 0.08
    assert (found - base)[:8].abs().mean() > 2 * differences.mean(), "adapters change what is likely"
    engine.close()


EXPERTS = {
    "qwen3 moe": {
        "architecture": "Qwen3MoeForCausalLM", "num_experts": 32, "num_experts_per_token": 4, "expert_size": 256,
        "qk_norm": True, "normalize_expert_weights": True,
    },
    "gpt-oss": {
        "architecture": "GptOssForCausalLM", "num_experts": 16, "num_experts_per_token": 4, "expert_size": 384,
        "expert_bias": True, "attention_sinks": True, "attention_bias": True, "swiglu_limit": 7.0, "norm_offset": 0.0,
    },
}  # fmt: skip
"""Small layers, whose adapters on all experts fit several times."""


def create_mixture(name: str) -> DecoderModel:
    torch.manual_seed(0)
    return DecoderModel(
        vocab_size=4000, num_layers=2, max_seq_len=4096, hidden_size=1024, intermediate_size=1024, num_heads=16,
        num_kv_heads=4, head_dim=64, device="cuda", dtype=torch.bfloat16, **EXPERTS[name],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("lens", "config"),
    [
        ([1, 2, 16, 30, 5, 9, 40, 3, 8, 12], {}),
        ([300, 700, 150, 40, 5, 900, 1, 64, 500, 256], {"max_tokens_per_step": 4096}),
        ([300, 700, 150, 40, 5, 900, 1, 64, 500, 256], {"quantization": "fp8"}),
    ],
    ids=["few rows", "many rows", "fp8"],
)
@pytest.mark.parametrize("name", EXPERTS)
def test_adapters_on_experts_equal_their_merged_models(tmp_path, name, lens, config):
    """In bfloat16, on routers and experts too. Where a token's experts are nearly tied it may go to another one."""
    model = create_mixture(name)
    adapters = [*write_adapters(model, tmp_path, with_experts=True), None, None]
    requests = requests_of(lens, adapters)
    expected = of_merged_models(model, requests)
    engine = create_engine(model, max_adapters=8, max_adapter_rank=32, adapter_experts=True, **config)
    found = logprobs(engine, requests)
    base = logprobs(engine, [request.model_copy(update={"adapter": None}) for request in requests])
    differences = (found - expected).abs()
    print(f"{name}: mean {differences.mean():.4f}, most {differences.max():.4f}, "
          f"adapters change {(found - base)[:8].abs().mean():.4f}")  # fmt: skip
    assert differences.mean() < (0.35 if "quantization" in config else 0.05)
    assert (found - base)[:8].abs().mean() > 2 * differences.mean(), "adapters change what is likely"
    engine.close()


@pytest.mark.parametrize("name", ["qwen3-0.6b", *EXPERTS])
def test_deterministic(tmp_path, name):
    """Alone and together, bit by bit."""
    torch.manual_seed(0)
    if name in EXPERTS:
        model = create_mixture(name)
    else:
        model = DecoderModel(vocab_size=4000, num_layers=2, max_seq_len=4096, device="cuda", dtype=torch.bfloat16,
                             **SHAPES[name])  # fmt: skip
    adapters = [*write_adapters(model, tmp_path, with_experts=name in EXPERTS), None, None]
    requests = requests_of([1, 2, 16, 300, 5, 900, 40, 3, 8, 12], adapters)
    engine = create_engine(model, max_adapters=8, max_adapter_rank=32, adapter_experts=True, deterministic=True)
    together = logprobs(engine, requests)
    alone = torch.cat([logprobs(engine, [request]) for request in requests])
    assert torch.equal(together, alone)
    engine.close()
