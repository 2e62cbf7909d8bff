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


def write_adapters(model: DecoderModel, directory: Path) -> list[AdapterRef]:
    for i, rank in enumerate(RANKS):
        write_random_adapter(model.config, directory / str(i), rank=rank, seed=i, std=0.05 / rank**0.25)
    paths = [directory / str(i) for i in range(len(RANKS))]
    return [AdapterRef(name=path.name, path=str(path), digest=adapter_digest(path)) for path in paths]


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
    expected = []
    for request in requests:
        merged = copy.deepcopy(model)
        if request.adapter is not None:
            load_lora(merged, request.adapter.path)
            merged.merge_lora()
        alone = create_engine(merged, attention_backend="reference")
        expected.append(logprobs(alone, [request.model_copy(update={"adapter": None})])[0])
    engine = create_engine(model, max_adapters=8, max_adapter_rank=32, **config)
    found = logprobs(engine, requests)
    base = logprobs(engine, [request.model_copy(update={"adapter": None}) for request in requests])
    differences = (found - torch.stack(expected)).abs()
    if config:  # activations of many rows are rounded to 8 bits
        assert differences.mean() < 0.35
    else:
        assert differences.max() < 0.08
    assert (found - base)[:8].abs().mean() > 2 * differences.mean(), "adapters change what is likely"
    engine.close()


def test_deterministic(tmp_path):
    """Alone and together, bit by bit."""
    torch.manual_seed(0)
    model = DecoderModel(vocab_size=4000, num_layers=2, max_seq_len=4096, device="cuda", dtype=torch.bfloat16,
                         **SHAPES["qwen3-0.6b"])  # fmt: skip
    adapters = [*write_adapters(model, tmp_path), None, None]
    requests = requests_of([1, 2, 16, 300, 5, 900, 40, 3, 8, 12], adapters)
    engine = create_engine(model, max_adapters=8, max_adapter_rank=32, deterministic=True)
    together = logprobs(engine, requests)
    alone = torch.cat([logprobs(engine, [request]) for request in requests])
    assert torch.equal(together, alone)
    engine.close()
